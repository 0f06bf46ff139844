"""Tasks of images and texts that belong together: what they are, and their items."""

from __future__ import annotations

from dive_fast.data.tasks.items import TaskData, TaskItem, open_task
from dive_fast.data.tasks.spec import TaskSpec, read_task, task_names

__all__ = ["TaskData", "TaskItem", "TaskSpec", "open_task", "read_task", "task_names"]
