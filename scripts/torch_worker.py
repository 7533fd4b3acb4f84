"""The PyTorch side of `scripts/benchmark_torch.py`, in a process of its own; not run by hand.

It imports nothing of this project, so that any interpreter with torch, transformers and peft can run it. Each line of standard
input is a JSON object, answered by one line on standard output:

  {"kind": "step" | "decode", "folder": ..., "arrays": ..., "sides": {name: {...}}, ...}   the first: {"versions": {...}}
  {"run": name}                                                           one step or generation: {"seconds": ...,
                                                                          "cpu_seconds": ..., "loss" or "tokens": ...}

A missing package is answered by {"missing": name}. Between lines it waits for input and computes nothing.
"""

import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

_PACKAGES = ("torch", "transformers", "peft")
_MLP = {"gate_proj", "up_proj", "down_proj"}


def main() -> None:
    """Answers lines until standard input ends."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")

    spec = json.loads(sys.stdin.readline())
    needed = (*_PACKAGES, *({"mixlora"} & {side["method"] for side in spec["sides"].values()}))
    for package in needed:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            answer(missing=error.name)
            return
    import torch

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    make = {"step": _make_step, "decode": _make_decoding}[spec["kind"]]
    runs = {name: make(spec, side) for name, side in spec["sides"].items()}
    answer(versions={package: importlib.metadata.version(package) for package in needed})
    for line in sys.stdin:
        run = runs[json.loads(line)["run"]]
        start, cpu_start = time.perf_counter(), time.process_time()
        result = run()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        answer(seconds=seconds, cpu_seconds=cpu_seconds, **result())


def _load(spec: Mapping[str, Any], side: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """The adapted model and its trained parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=torch.float32)
    model.requires_grad_(False)
    return {"lora": _with_lora, "mixlora": _with_mixlora}[side["method"]](model, side)


def _with_lora(model: Any, side: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=side["rank"],
        lora_alpha=side["alpha"],
        target_modules=side["modules"],
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    return model, [p for p in model.parameters() if p.requires_grad]


def _with_mixlora(model: Any, side: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """mixlora's experts on the MLP, fresh: gates normal, A kaiming-uniform, B zero.

    The package only loads trained weights, and keeps the experts outside of torch's module tree, so that fresh ones are made
    here and collected by hand. It demands a dropout rate over 0; the experts are in evaluation mode, where none is drawn.
    """
    import torch
    from mixlora.config import MixLoraConfig
    from mixlora.model import inject_adapter_in_model

    modules = sorted(_MLP & set(side["modules"]))
    config = MixLoraConfig.from_config(
        {
            "base_model_name_or_path": "base",
            "task_type": "CAUSAL_LM",
            "peft_type": "MIXLORA",
            "routing_strategy": "mixlora",
            "r": side["rank"],
            "lora_alpha": side["alpha"],
            "lora_dropout": 0.05,
            "target_modules": modules,
            "num_experts": side["num_experts"],
            "top_k": side["num_selected_experts"],
            "act_fn": model.config.hidden_act,
        }
    )
    config.adapter_name_, config.dtype_ = "default", torch.float32
    config.check()
    weights, trained = {}, []
    for index, layer in enumerate(model.model.layers):
        prefix = f"mixlora.layers.{index}.mlp"
        gate = torch.nn.Parameter(torch.randn(side["num_experts"], model.config.hidden_size) * 0.02)
        weights[f"{prefix}.moe_gate.weight"] = gate
        trained.append(gate)
        for name in modules:
            d_out, d_in = getattr(layer.mlp, name).weight.shape
            bound = d_in**-0.5
            for expert in range(side["num_experts"]):
                place = f"{prefix}.{name}.experts.{expert}"
                a = torch.empty(side["rank"], d_in).uniform_(-bound, bound)
                weights[f"{place}.lora_A.weight"] = a
                weights[f"{place}.lora_B.weight"] = torch.zeros(d_out, side["rank"])
    inject_adapter_in_model(model, config, weights)
    for layer in model.model.layers:
        for expert in layer.mlp.mixlora_moes["default"].experts_.values():
            expert.eval()
            trained += [expert.lora_A.weight, expert.lora_B.weight]
    return model, [p.requires_grad_() for p in trained]


def _make_step(spec: Mapping[str, Any], side: Mapping[str, Any]) -> Callable[[], Callable]:
    """A training step with clipping and torch's fused AdamW, the fastest it has on CPU; the batch is the same each time."""
    import numpy as np
    import torch

    model, trained = _load(spec, side)
    model.train()
    optimizer = torch.optim.AdamW(
        trained,
        lr=spec["learning_rate"],
        betas=(spec["beta1"], spec["beta2"]),
        eps=spec["epsilon"],
        weight_decay=spec["weight_decay"],
        fused=True,
    )
    arrays = np.load(spec["arrays"])
    inputs_BT = torch.tensor(arrays["inputs"], dtype=torch.int64)
    targets_N = torch.tensor(arrays["targets"], dtype=torch.int64).reshape(-1)

    def step() -> Callable[[], dict]:
        optimizer.zero_grad(set_to_none=True)
        logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_N)
        loss.backward()
        if spec["clip_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(trained, spec["clip_norm"])
        optimizer.step()
        return lambda: {"loss": loss.item()}

    return step


def _make_decoding(spec: Mapping[str, Any], side: Mapping[str, Any]) -> Callable[[], Callable]:
    """Greedy generation of a fixed number of tokens after prompts of equal length."""
    import numpy as np
    import torch

    model, _ = _load(spec, side)
    model.eval()
    prompts_BT = torch.tensor(np.load(spec["arrays"])["inputs"], dtype=torch.int64)
    # No token may end a row early, so that both sides generate as many.
    model.generation_config.eos_token_id = None
    new_tokens = spec["new_tokens"]

    def generate() -> Callable[[], dict]:
        with torch.inference_mode():
            rows = model.generate(
                input_ids=prompts_BT,
                attention_mask=torch.ones_like(prompts_BT),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return lambda: {"tokens": rows[:, prompts_BT.shape[1] :].tolist()}

    return generate


if __name__ == "__main__":
    main()
