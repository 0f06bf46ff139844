"""How the page looks. Fonts are those of the reader's machine: none is fetched."""

from __future__ import annotations

import gradio as gr

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
h1 { font-size: 1.6rem; margin: 0.4rem 0 0.2rem; }
.told { font-size: 1.15rem; margin: 0.2rem 0; padding: 0.6rem 0.8rem; border-radius: 6px;
  border-left: 4px solid var(--border-color-primary); background: var(--background-fill-secondary);
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.told.running { border-left-color: #2563eb; }
.told.stopped { border-left-color: #b45309; }
.told.done { border-left-color: #15803d; font-weight: 600; }
.told.error { border-left-color: #b91c1c; }
.note { font-size: 0.9rem; color: var(--body-text-color-subdued); margin: 0.2rem 0;
  overflow-wrap: anywhere; }
.rows { overflow-x: auto; }
.rows table { width: 100%; border-collapse: collapse; font-size: 0.9rem; }
.rows caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
.rows th, .rows td { padding: 0.3rem 0.5rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--border-color-primary); font-variant-numeric: tabular-nums; }
.rows th:first-child, .rows td:last-child { text-align: left; }
.rows thead th { font-weight: 600; }
"""


def theme() -> gr.themes.Base:
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=list(_SANS), font_mono=list(_MONO)
    )
