"""The Triton kernels in Triton's interpreter; test_triton.py runs this file in a new process."""

from __future__ import annotations

import dataclasses
import os

import device_checks
import torch
from triton.runtime import interpreter

from dive_fast.kernels import noise_prediction_loss, q_sample

LOSS = noise_prediction_loss.noise_prediction_loss
BACKWARD = noise_prediction_loss.noise_prediction_loss_backward


def test_the_interpreter_is_on():
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_q_sample():
    device_checks.check_q_sample(q_sample.q_sample, "cpu")


def test_loss_and_backward():
    device_checks.check_loss(LOSS, BACKWARD, "cpu")


def test_not_a_number_is_passed_on():
    device_checks.check_not_a_number_is_passed_on(LOSS, BACKWARD, "cpu")


def test_unknown_codes_are_refused():
    device_checks.check_unknown_codes_are_refused(LOSS, BACKWARD, "cpu")


def test_every_element_is_written(poisoned_memory):
    device_checks.check_q_sample(q_sample.q_sample, "cpu")
    inputs = device_checks.loss_inputs(device_checks.LONG, learned_sigma=True)
    grad = torch.ones(device_checks.LONG.rows)
    assert not LOSS(*inputs, None, 0, 0).isnan().any()
    assert not BACKWARD(grad, *inputs, None, 0, 0).isnan().any()


def test_an_index_out_of_range_is_caught(monkeypatch):
    # The interpreter ignores the launch option that keeps assertions.
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    device_checks.check_an_index_out_of_range_is_caught(q_sample.q_sample, LOSS)
