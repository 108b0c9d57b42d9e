"""The flat vector on a GPU: cuDNN finds its weights in one chunk and copies nothing."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from mpilm.data.streams import Streams
from mpilm.learner.learner import Learner
from mpilm.learner.parameters import ModelError, storage_at_start
from mpilm.models.lstm_lm import LstmLm

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TOKENS = np.random.default_rng(0).integers(0, 50, 5000).astype(np.uint16)


def make_learner(device, **settings):
    torch.manual_seed(1)
    model = LstmLm(50, **{"embed": 16, "hidden": 24, "layers": 2, **settings})

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.5, momentum=0.9, fused=True)

    return Learner(model, Streams(TOKENS, 4, 10), optimizer, device=device)


def train(learner, num_steps):
    losses = []
    for _ in range(num_steps):
        losses.append(float(learner.gradient()))
        learner.update()
    return losses


def test_a_slice_gets_a_storage_of_its_own_over_the_same_memory():
    vector = torch.arange(10.0)
    part = storage_at_start(vector[4:7])
    assert part.storage_offset() == 0
    assert part.untyped_storage().data_ptr() == vector[4:].data_ptr()
    assert part.untyped_storage().nbytes() == 3 * 4
    vector[5] = 50.0
    assert part.tolist() == [4.0, 50.0, 6.0]
    del vector
    assert part.tolist() == [4.0, 50.0, 6.0]


@pytest.mark.gpu
@needs_gpu
def test_cudnn_needs_no_copy_of_the_weights():
    learner = make_learner("cuda")
    with warnings.catch_warnings():  # torch warns when it has to copy
        warnings.simplefilter("error")
        train(learner, 3)
    lstm = learner.model.lstm
    chunk = lstm.weight_ih_l0.untyped_storage()
    assert chunk.data_ptr() == min(p.data_ptr() for p in lstm.parameters())
    assert all(
        p.untyped_storage().data_ptr() == chunk.data_ptr() for p in lstm.parameters()
    )
    for segment in learner.layout:
        parameter = learner.model.get_parameter(segment.name)
        assert parameter.data_ptr() == learner.theta[segment.slice].data_ptr()
        assert parameter.grad.data_ptr() == learner.grad[segment.slice].data_ptr()


@pytest.mark.gpu
@needs_gpu
def test_the_gpu_trains_as_the_cpu_does():
    gpu, cpu = make_learner("cuda"), make_learner("cpu")
    assert gpu.layout == cpu.layout
    assert train(gpu, 5) == pytest.approx(train(cpu, 5), rel=1e-3)
    assert isinstance(gpu.gradient(), torch.Tensor)


@pytest.mark.gpu
@needs_gpu
def test_resume_on_a_gpu_is_exact_to_the_bit_with_dropout():
    whole = make_learner("cuda", dropout=0.3)
    train(whole, 3)
    state = whole.state()
    losses = train(whole, 3)
    resumed = make_learner("cuda", dropout=0.3)
    resumed.load_state(state)
    assert train(resumed, 3) == losses


@pytest.mark.gpu
@needs_gpu
def test_a_model_that_left_the_gpu_is_refused():
    learner = make_learner("cuda")
    learner.model.cpu()
    with pytest.raises(ModelError, match="left the learner's vector"):
        learner.gradient()
