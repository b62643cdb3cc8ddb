# ruff: noqa: RUF001, E402 (× and – are meant; Triton's interpreter is chosen before it is imported)
"""Everything that has to be measured on a GPU, in one run of under eight minutes.

make gpu                                     # one H100 or H200; writes RESULTS-GPU.md and results-gpu.json
python benchmarks/gpu.py --tiny              # the same on a CPU, with Triton's interpreter: does it work?
python benchmarks/gpu.py --only exactness    # some parts
python benchmarks/gpu.py --out FOLDER        # where the results go

It needs torch, Triton, transformers and peft, and no network. What else is missing, or fails, is told in the
report and does not keep the other parts from running: they run in a process of their own, which is
replaced by another when a failure has left the GPU unusable, and stopped when it hangs. Both
results-gpu.json and RESULTS-GPU.md are replaced after each part, in one piece. COMMIT in the environment
names the commit where there is no repository.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

TINY = "--tiny" in sys.argv
if TINY:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it need not be installed
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is loaded; silences its profiler

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import measure
import training
from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.kernels import kernels_of
from flatlora_optim.targets.scales import RowNorms, merged_norms
from layers import LLAMA_BLOCK, SIGMA, Shape, adapted_weights, flatlora, frozen_bytes, stack, twin
from measure import interleave, ratio, synchronize
from transcription import Transcription

HERE = Path(__file__).parent
DEVICE = "cpu" if TINY else "cuda"
SHAPES: list[Shape] = [(24, 16), (5, 40)] if TINY else LLAMA_BLOCK * 32
RANK = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CYCLES = (1, 2) if TINY else (1, 10, 200)
ROUNDS = 1 if TINY else 8
LIMIT = 400.0  # seconds after which no part begins any more
END = 470.0  # seconds after which the part that is under way is stopped
_began = time.time()

BARS = {
    "cycle": "norms, perturb and restore, at most 3 times what it takes to read and write the weights twice "
    "and read them once",
    "step": "a step with 8,192 tokens, at most 4 % over plain LoRA",
    "memory": "memory, at most 12 % of the frozen bytes",
    "bits": "no bit differs",
}

Record = dict[str, Any]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------ parts


def exactness(dtype: torch.dtype) -> Record:
    """Elements that differ after so many cycles, over Llama-2-7B's shapes."""
    model = stack(SHAPES, rank=RANK, dtype=dtype, device=DEVICE)
    optimizer, done = flatlora(model), 0
    clean = [adapted.weight.detach().clone() for adapted in adapted_weights(model)]
    start = time.perf_counter()
    differ: dict[str, int] = {}
    held = 0
    for cycles in CYCLES:
        for _ in range(cycles - done):
            optimizer.perturb()
            held = optimizer.memory()
            optimizer.step()
        done = cycles
        differ[str(cycles)] = sum(
            int((_bits(adapted.weight.detach()) != _bits(before)).sum())
            for adapted, before in zip(adapted_weights(model), clean, strict=True)
        )
    return {
        "differ": differ,
        "elements": sum(weight.numel() for weight in clean),
        "held": held / frozen_bytes(model),
        "seconds": time.perf_counter() - start,
    }


def statistics() -> Record:
    """How far the noise is from independent standard normal numbers, in standard errors; and its tails."""
    shape = (24, 64) if TINY else (4096, 4096)
    model = stack([shape, shape], rank=RANK, device=DEVICE)
    with torch.no_grad():
        for a in adapted_weights(model):
            a.B.zero_()
    optimizer, numbers = flatlora(model), []
    for _ in range(2):
        clean = [adapted.weight.detach().double() for adapted in adapted_weights(model)]
        optimizer.perturb()
        for adapted, before in zip(adapted_weights(model), clean, strict=True):
            scale = SIGMA * before.norm(dim=1, keepdim=True) / math.sqrt(shape[1])
            numbers.append((adapted.weight.detach().double() - before) / scale)
        optimizer.step()
    z, n = numbers[0], numbers[0].numel()

    def together(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum() / math.sqrt(a.numel()))

    errors = {
        "mean": float(z.sum()) / math.sqrt(n),
        "variance": float(z.square().mean() - 1) * math.sqrt(n / 2),
        "third moment": float(z.pow(3).mean()) * math.sqrt(n / 15),
        "fourth moment": float(z.pow(4).mean() - 3) * math.sqrt(n / 96),
        "neighbours in a row": together(z[:, 1:], z[:, :-1]),
        "neighbours in a column": together(z[1:], z[:-1]),
        "256 apart": together(z.flatten()[256:], z.flatten()[:-256]),
        "two layers": together(z, numbers[1]),
        "two steps": together(z, numbers[2]),
    }
    for bound in (1, 2, 3, 4, 5):
        expected = math.erfc(bound / math.sqrt(2))
        share = float((z.abs() > bound).double().mean())
        errors[f"beyond {bound} σ"] = (share - expected) / math.sqrt(expected * (1 - expected) / n)
    return {
        "standard errors": errors,
        "largest": float(z.abs().max()),
        "numbers": n,
        "same as C": _same_as_c(),
    }


def _same_as_c() -> bool | None:
    """Whether the device makes the numbers that native code makes on the CPU; None where there is none."""
    from flatlora_optim.kernels import native
    from flatlora_optim.noise import NoiseKey

    if not native.is_available():
        return None
    ours, theirs = (
        torch.empty(5000 if TINY else 1 << 22, device=DEVICE),
        torch.empty(5000 if TINY else 1 << 22),
    )
    kernels_of(ours.device).fill(ours, NoiseKey(3, 70_000, 2), 5)
    native.fill(theirs, NoiseKey(3, 70_000, 2), 5)
    return torch.equal(_bits(ours.cpu()), _bits(theirs))


def engine() -> Record:
    """Milliseconds of each phase, beside a copy of the same bytes and the published procedure."""
    model = stack(SHAPES, rank=RANK, dtype=torch.bfloat16, device=DEVICE)
    weights = [adapted.weight.detach() for adapted in adapted_weights(model)]
    made: list[FlatLoRAOptimizer] = []

    def first_cycle() -> None:
        made.append(flatlora(model))
        made[0].perturb()
        held.append(made[0].memory())
        made[0].step()

    held: list[int] = []
    memory = measure.peak_memory(first_cycle, DEVICE)
    optimizer = made[0]
    optimizer.perturb()
    optimizer.step()
    counts = {}
    for phase, work in (("perturb", optimizer.perturb), ("restore", optimizer.restore)):
        counts[phase] = _launches(work)
    optimizer.step()
    for phase, work in (("perturb", optimizer.perturb), ("restore", optimizer.restore)):
        counts[phase]["waits"] = _waits(work)
    optimizer.step()

    scratch = torch.empty(max(weight.numel() for weight in weights), dtype=torch.bfloat16, device=DEVICE)
    phases: dict[str, list[float]] = {"norms and perturb": [], "restore": [], "perturb": []}
    published = Transcription(model)

    def copy() -> None:
        for weight in weights:
            scratch[: weight.numel()].copy_(weight.view(-1))

    def ours() -> float:
        for phase, work in (
            ("norms and perturb", optimizer.perturb),
            ("restore", optimizer.restore),
            ("perturb", optimizer.perturb),
            ("", optimizer.step),
        ):
            synchronize(DEVICE)
            start = time.perf_counter()
            work()
            synchronize(DEVICE)
            if phase:
                phases[phase].append(time.perf_counter() - start)
        return phases["norms and perturb"][-1] + phases["restore"][-1]

    def transcribed() -> None:
        published.perturb()
        published.restore()

    seconds = interleave({"copy": copy, "ours": ours, "transcription": transcribed}, ROUNDS, DEVICE)
    optimizer = flatlora(model, noise="low_rank")
    optimizer.perturb()
    optimizer.step()
    counts["perturb, low rank"] = _launches(optimizer.perturb) | {"waits": None}
    return {
        "kernels": kernels_of(weights[0].device).name,
        "weights": len(weights),
        "bytes": frozen_bytes(model),
        "memory": memory,
        "held": held[0],
        "counts": counts,
        "seconds": seconds,
        "phases": {phase: values[1:] for phase, values in phases.items()},
    }


def _launches(work: Callable[[], object]) -> Record:
    """What the device was given to do, by the profiler."""
    if TINY:
        work()
        return {}
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            work()
            synchronize(DEVICE)
    except RuntimeError as error:  # the profiler may not be allowed to look
        return {"names": {repr(error)[:200]: 0}}
    names: dict[str, int] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            names[event.name[:60]] = names.get(event.name[:60], 0) + 1
    return {"launches": sum(names.values()), "names": names}


def _waits(work: Callable[[], object]) -> int | None:
    if TINY:
        work()
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def settings(
    names: Sequence[str],
    choices: Sequence[Sequence[int]],
    works_of: Callable[[nn.Module], dict[str, Callable[[], None]]],
) -> Record:
    """Milliseconds with other settings of the kernels, and the best of them. The first are those that are
    used."""
    from flatlora_optim.kernels import triton as kernels

    model = stack(SHAPES[:2] if TINY else LLAMA_BLOCK * 4, rank=RANK, dtype=torch.bfloat16, device=DEVICE)
    record: Record = {}
    best = math.inf
    for values in choices[:1] if TINY else choices:
        title = ", ".join(f"{name} = {value}" for name, value in zip(names, values, strict=True))
        if time.time() - _began > LIMIT + 30:
            record[title] = "skipped"
            continue
        before = [getattr(kernels, name) for name in names]
        try:
            _set(kernels, names, values)
            seconds = interleave(works_of(twin(model)), ROUNDS, DEVICE)
            taken = {phase: 1e3 * _median(times) for phase, times in seconds.items()}
            record[title] = {phase: round(time, 3) for phase, time in taken.items()}
            if sum(taken.values()) < best:
                best = sum(taken.values())
                record["best"] = title
        except Exception as error:
            record[title] = repr(error)[:300]
            synchronize(DEVICE)  # raises if nothing more can be measured
        finally:
            _set(kernels, names, before)
        _free()
    return record


def _set(kernels: Any, names: Sequence[str], values: Sequence[int]) -> None:
    for name, value in zip(names, values, strict=True):
        setattr(kernels, name, value)
    kernels._only.cache_clear()
    kernels._norm_tables.cache_clear()


def _cycle_of(model: nn.Module) -> dict[str, Callable[[], None]]:
    """Only the first perturb of a step takes norms."""
    optimizer = flatlora(model)
    return {"perturb": optimizer.perturb, "restore": optimizer.restore}


def _norms_of(model: nn.Module) -> dict[str, Callable[[], None]]:
    rows = [RowNorms(target) for target in flatlora(model).targets]

    def norms() -> None:
        merged_norms(rows)

    return {"norms": norms}


def steps() -> Record:
    """A training step of a random Llama-2-7B with 4 × 2048 tokens, in micro-batches, with checkpointing."""
    variants = {
        "plain LoRA": training.plain,
        "ours": training.ours(),
        "ours, low rank": training.ours(noise="low_rank"),
        "transcription": training.transcription,
        "SAM": training.sam,
    }
    return _steps(_with_lora(_llama()), variants)


def nf4() -> Record:
    """The same with a base model in NF4, where bitsandbytes is there."""
    try:
        import bitsandbytes as bnb
    except Exception as error:
        return {"skipped": f"bitsandbytes can't be imported: {error!r}"[:300]}
    model = _llama()
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                packed = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False,
                    compute_dtype=torch.bfloat16, quant_type="nf4", device="meta",
                )  # fmt: skip
                weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                packed.weight = weight.to(DEVICE)
                setattr(module, name, packed)
    _free()
    variants = {"plain LoRA": training.plain, "ours": training.ours()}
    return _steps(_with_lora(model), variants | {"ours, gaussian": training.ours(noise="gaussian")})


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(LlamaConfig(**(tiny if TINY else {}), use_cache=False))
    finally:
        torch.set_default_dtype(before)
    return model.to(DEVICE)


def _with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    projections = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    adapted: Any = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=projections))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted.train()


def _steps(model: Any, variants: dict[str, Callable[[nn.Module], training.Step]]) -> Record:
    vocabulary, tokens, batches = (64, 8, 2) if TINY else (32000, 2048, 4)
    ids = torch.randint(0, vocabulary, (batches, tokens), device=DEVICE)
    runs: dict[str, Callable[[], None]] = {}
    memory: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, build in variants.items():
        own = twin(model)

        def gradient(own: Any = own) -> None:
            for row in ids:
                (own(input_ids=row[None], labels=row[None]).loss / len(ids)).backward()

        def first_step(
            name: str = name, build: Any = build, own: Any = own, gradient: Callable[[], None] = gradient
        ) -> None:
            step = build(own)
            runs[name] = lambda: step(gradient)
            runs[name]()

        try:
            if DEVICE == "cuda":
                memory[name] = measure.peak_memory(first_step, DEVICE)
            else:
                first_step()
        except torch.OutOfMemoryError as error:
            runs.pop(name, None)
            failed[name] = str(error)[:300]
            _free()
    seconds = interleave(runs, 1 if TINY else 4, DEVICE)
    return {"seconds": seconds, "memory": memory, "tokens": ids.numel(), "left out": failed}


def tests() -> Record:
    """The tests that need a GPU, where pytest is there."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-o", "addopts=", "--noconftest", "-p"]
    command += ["no:cacheprovider", str(HERE.parent / "tests/test_cuda.py")]
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parent / "tests"), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=180
        )
    except subprocess.TimeoutExpired as error:
        return {"failed": f"no end within three minutes\n{(error.stdout or b'').decode()[-3000:]}"}
    return {"status": done.returncode, "output": (done.stdout + done.stderr)[-4000:]}


PARTS: dict[str, Callable[[], Record]] = {
    "engine": engine,
    **{f"exactness {_name(dtype)}": partial(exactness, dtype) for dtype in DTYPES},
    "statistics": statistics,
    "steps": steps,
    "nf4": nf4,
    "tests": tests,
    "settings of the noise": partial(
        settings,
        ("TILE", "WARPS"),
        [(4096, 4), (2048, 4), (8192, 4), (4096, 8), (8192, 8), (2048, 2)],
        _cycle_of,
    ),
    "settings of the norms": partial(
        settings,
        ("_ROWS", "_COLUMNS", "_NORM_WARPS"),
        [(64, 64, 4), (128, 64, 4), (64, 128, 4), (128, 64, 8), (32, 128, 4)],
        _norms_of,
    ),
}


# ------------------------------------------------------------------------ report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes, on the CPU, into outputs/")
    parser.add_argument("--only", help=f"comma-separated parts, or beginnings of them, of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="the folder for the results")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)  # of the process that does the work
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [""]
    chosen = [name for name in PARTS if name.startswith(tuple(wanted))]
    if unknown := [each for each in wanted if not any(name.startswith(each) for name in PARTS)]:
        parser.error(f"no such part: {', '.join(unknown)}")
    folder = options.out or (HERE.parent / "outputs/benchmarks" if TINY else HERE)
    if options.began is not None:
        return _work(chosen, folder, options.began)
    folder.mkdir(parents=True, exist_ok=True)
    results = _supervise(chosen, folder)
    if "machine" not in results:
        return 1
    print(markdown(results))
    return 1 if any("failed" in record for record in results["parts"].values()) else 0


def _supervise(chosen: list[str], folder: Path) -> Record:
    """Has other processes do the work, each for what the one before has left."""
    began = time.time()
    results: Record = {"parts": {}}
    while remaining := [name for name in chosen if name not in results["parts"]]:
        command = [sys.executable, __file__, "--only", ",".join(remaining), "--out", str(folder)]
        command += ["--began", repr(began), *["--tiny"] * TINY]
        process = subprocess.Popen(command, start_new_session=True)  # its tests end with it
        try:
            process.wait(max(1.0, began + END - time.time()))
            reason = f"its process ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"{END:.0f} s had passed"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        before, results = len(results["parts"]), _known(folder, began)
        if (broken := results.pop("under way", None)) is not None:
            results["parts"][broken] = {"failed": reason}
            _report(results, folder, began)
        if time.time() - began > END:
            break
        if broken is None and len(results["parts"]) == before:
            print(f"nothing can be measured: {reason}", flush=True)
            break
    return results


def _work(chosen: list[str], folder: Path, began: float) -> int:
    global _began
    _began = began
    if not TINY and not torch.cuda.is_available():
        print("there is no GPU here: `--tiny` shows on the CPU that the script works")
        return 2
    results = _known(folder, began)
    results.setdefault("machine", measure.machine(DEVICE))
    results.setdefault("commit", os.environ.get("COMMIT") or measure.commit())
    for name in chosen:
        elapsed = time.time() - began
        if elapsed > LIMIT:
            results["parts"][name] = {"skipped": f"{elapsed:.0f} s had passed"}
            _report(results, folder, began)
            continue
        print(f"{name} …", flush=True)
        _report(results | {"under way": name}, folder, began)
        try:
            results["parts"][name] = PARTS[name]()
        except Exception:
            results["parts"][name] = {"failed": traceback.format_exc()[-3000:]}
            print(results["parts"][name]["failed"], flush=True)
        print(f"{name}: {time.time() - began - elapsed:.1f} s", flush=True)
        _report(results, folder, began)
        if "failed" in results["parts"][name]:
            synchronize(DEVICE)  # raises if the GPU can't be used any more by this process
        _free()
    return 0


def _known(folder: Path, began: float) -> Record:
    """What this run has measured so far."""
    file = folder / "results-gpu.json"
    known: Record = json.loads(file.read_text()) if file.exists() else {}
    return known if known.get("began") == began else {"began": began, "parts": {}}


def _report(results: Record, folder: Path, began: float) -> None:
    results["seconds"] = round(time.time() - began, 1)
    _write(folder / "results-gpu.json", json.dumps(results, indent=1) + "\n")
    if results["parts"]:
        _write(folder / "RESULTS-GPU.md", markdown(results))


def _write(path: Path, text: str) -> None:
    """In one piece: a reader finds what there was before, or all of it."""
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(text)
    os.replace(fresh, path)


def markdown(results: Record) -> str:
    parts, machine = results["parts"], results["machine"]
    where = machine.get("gpu", f"{machine['cpu']}, with Triton's interpreter: the times mean nothing")
    missing = [name for name in PARTS if name not in parts]
    lines = [
        "# On a GPU",
        "",
        *([f"**Not measured: {', '.join(missing)}.**", ""] if missing else []),
        f"{where}; torch {machine['torch']}; commit {results['commit']}; {results['seconds']:.0f} s. Written "
        "by `make gpu`; [results-gpu.json](results-gpu.json) has all measurements.",
        "",
        "| bar | measured | |",
        "|---|---|---|",
    ]
    for bar, text in BARS.items():
        try:
            value, is_met = _measured(bar, parts)
            lines.append(f"| {text} | {value} | {'met' if is_met else '**missed**'} |")
        except Exception as error:
            lines.append(f"| {text} | not measured ({type(error).__name__}: {error}) | |")
    for name, record in parts.items():
        lines += ["", f"## {name}", ""]
        if reason := record.get("failed") or record.get("skipped"):
            lines += ["```", str(reason).strip(), "```"]
            continue
        try:
            lines += _TABLES[name.split()[0]](record)
        except Exception as error:
            lines.append(f"(no table: {error!r})")
    return "\n".join(lines) + "\n"


def _measured(bar: str, parts: Record) -> tuple[str, bool]:
    if bar == "cycle":
        seconds = parts["engine"]["seconds"]
        # A copy reads and writes once; reading and writing twice and reading once is 2.5 of it.
        times = ratio(seconds["ours"], [2.5 * copy for copy in seconds["copy"]])
        return f"{times:.2f} times", times.median <= 3
    if bar == "step":
        seconds = parts["steps"]["seconds"]
        more = ratio(seconds["ours"], seconds["plain LoRA"])
        return f"{more.median - 1:+.1%} ({more.low - 1:+.1%} to {more.high - 1:+.1%})", more.median <= 1.04
    if bar == "memory":
        share = parts["engine"]["memory"] / parts["engine"]["bytes"]
        return f"{share:.1%}", share <= 0.12
    found = [parts[f"exactness {_name(dtype)}"]["differ"] for dtype in DTYPES]
    differ = sum(max(counts.values()) for counts in found)
    return f"{differ} elements", differ == 0


def _engine_table(record: Record) -> list[str]:
    copy = record["seconds"]["copy"]
    lines = [
        f"{record['weights']} weights in bf16, {record['bytes'] / 1e9:.2f} GB; kernels: {record['kernels']}.",
        "",
        "| | ms, median | times a copy of the weights |",
        "|---|---|---|",
    ]
    named = record["phases"] | record["seconds"]
    for name, values in named.items():
        title = "norms, perturb and restore" if name == "ours" else name
        lines.append(f"| {title} | {1e3 * _median(values):.2f} | {ratio(values, copy):.2f} |")
    lines += [
        "",
        f"Peak memory of the first cycle: {record['memory'] / record['bytes']:.1%} of the weights; held: ",
    ]
    lines[-1] += f"{record['held'] / record['bytes']:.1%}."
    for phase, count in record["counts"].items():
        lines += ["", f"{phase}: {count.get('launches', '–')} launches, {count.get('waits')} waits."]
        lines += [f"- {number} × `{name}`" for name, number in count.get("names", {}).items()]
    return lines


def _exactness_table(record: Record) -> list[str]:
    differ = ", ".join(f"{count} after {cycles}" for cycles, count in record["differ"].items())
    return [
        f"Of {record['elements']:,} elements differ, after so many cycles: {differ}. Held: "
        f"{record['held']:.1%} of the weights. {record['seconds']:.1f} s."
    ]


def _statistics_table(record: Record) -> list[str]:
    lines = ["| | off by so many standard errors |", "|---|---|"]
    lines += [f"| {name} | {error:+.2f} |" for name, error in record["standard errors"].items()]
    bits = {True: "the same bits as", False: "**other bits than**", None: "not compared with"}[
        record["same as C"]
    ]
    return [
        *lines,
        "",
        f"The largest of {record['numbers']:,}: {record['largest']:.2f} σ; {bits} native code.",
    ]


def _steps_table(record: Record) -> list[str]:
    plain = record["seconds"]["plain LoRA"]
    lines = [
        f"{record['tokens']:,} tokens.",
        "",
        "| | s, median | times plain LoRA | peak memory, GB |",
        "|---|---|---|---|",
    ]
    for name, values in record["seconds"].items():
        memory = record["memory"].get(name, math.nan) / 1e9
        lines.append(f"| {name} | {_median(values):.3f} | {ratio(values, plain):.3f} | {memory:.2f} |")
    return lines + [f"\nLeft out: {name}: {reason}" for name, reason in record["left out"].items()]


def _plain_table(record: Record) -> list[str]:
    lines = [f"- {name}: {value}" for name, value in record.items() if name != "output"]
    return [*lines, "", "```", record["output"].strip(), "```"] if "output" in record else lines


_TABLES: dict[str, Callable[[Record], list[str]]] = {
    "engine": _engine_table,
    "exactness": _exactness_table,
    "statistics": _statistics_table,
    "steps": _steps_table,
    "nf4": _steps_table,
    "tests": _plain_table,
    "settings": _plain_table,
}


# ------------------------------------------------------------------------ helpers


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _free() -> None:
    import gc

    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
