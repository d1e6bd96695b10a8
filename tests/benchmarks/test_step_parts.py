"""Sorting of profiler traces: synthetic ones, whose parts are known, and one of a real product."""

import json

import pytest
import torch

from benchmarks.speed.step_parts import covered, part_of, step_parts


def kernel(name, stream, ts, dur, launcher=None):
    arguments = {} if launcher is None else {"External id": launcher}
    return {"ph": "X", "cat": "kernel", "name": name, "tid": stream, "ts": ts, "dur": dur, "args": arguments}


def op(name, number, ts, dur):
    return {"ph": "X", "cat": "cpu_op", "name": name, "tid": 1, "ts": ts, "dur": dur, "args": {"External id": number}}


def note(name, lane, ts, dur, category="gpu_user_annotation"):
    return {"ph": "X", "cat": category, "name": name, "tid": lane, "ts": ts, "dur": dur, "args": {}}


def test_kernels_by_annotation_launcher_and_name():
    events = [
        op("aten::addmm", 1, 0, 5),
        op("aten::bmm", 2, 5, 5),
        note("optimizer", 7, 5000, 1000),
        note("inputs", 20, 0, 3000),
        kernel("nvjet_tst_128x256", 7, 0, 1000, launcher=1),
        kernel("nvjet_tst_64x64", 7, 1000, 500, launcher=2),
        kernel("attention_forward_kernel", 7, 1500, 500),
        kernel("residual_norm_backward_kernel", 7, 2000, 1000),
        kernel("sm90_xmma_fprop_implicit_gemm_f16", 20, 500, 2000),
        kernel("linear_cross_entropy_kernel", 7, 4000, 500),
        kernel("multi_tensor_apply_kernel", 7, 5200, 400),
        kernel("vectorized_elementwise_kernel", 7, 5600, 300),
        {"ph": "M", "name": "process_name", "args": {}},
    ]
    found = step_parts({"traceEvents": events}, steps=2)
    expected = {"GEMM": 0.5, "attention": 0.5, "norm/elementwise": 0.5, "tokenizer": 1.0, "losses": 0.25}
    assert found["parts"] == pytest.approx(expected | {"optimizer": 0.35})
    # 0 to 3000 without a gap although two streams run, then 500 and 700.
    assert found["busy"] == pytest.approx((3000 + 500 + 700) / 1e3 / 2)
    assert found["kernels"] == 4
    assert found["largest"][0] == ("sm90_xmma_fprop_implicit_gemm_f16", "tokenizer", 1.0, 0.5)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("aten::mm, sm90_xmma_gemm_bf16bf16", "GEMM"),
        ("aten::_scaled_dot_product_cudnn_attention, cudnn_generated_fort_native_sdpa_sm90", "attention"),
        ("aten::_softmax, void at::native::(anonymous namespace)::softmax_warp_forward", "attention"),
        ("aten::_log_softmax, void cunn_SoftMaxForward<LogSoftMaxForwardEpilogue>", "losses"),
        (", triton_red_fused__log_softmax_nll_loss_forward_3", "losses"),
        (", triton_per_fused_add_mul_native_layer_norm_5", "norm/elementwise"),
        (", linear_gelu_backward_kernel", "norm/elementwise"),
        (", adamw_kernel", "optimizer"),
        ("aten::convolution_backward, cutlass_tensorop", "GEMM"),
        ("aten::copy_, Memcpy DtoD", "norm/elementwise"),
    ],
)
def test_rules(text, part):
    assert part_of(text) == part


def test_self_time_of_cpu_ops():
    events = [
        op("aten::linear", 1, 0, 100),
        op("aten::addmm", 2, 10, 80),
        op("aten::gelu", 3, 100, 50),
        op("aten::add_", 4, 150, 30),
        note("optimizer", 1, 140, 60, category="user_annotation"),
    ]
    found = step_parts({"traceEvents": events}, steps=1)["parts"]
    assert found["GEMM"] == pytest.approx(0.1)
    assert found["norm/elementwise"] == pytest.approx(0.05)
    assert found["optimizer"] == pytest.approx(0.03)


def test_union_of_spans():
    assert covered([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7
    assert covered([]) == 0


def test_a_real_trace(tmp_path):
    a = torch.randn(400, 400)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        a @ a
        with torch.profiler.record_function("tokenizer"):
            a @ a @ a
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    parts = step_parts(json.loads((tmp_path / "trace.json").read_text()), steps=1)["parts"]
    assert parts["tokenizer"] > 0.5 * parts["GEMM"] > 0
    assert parts["attention"] == 0
