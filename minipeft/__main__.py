"""`python -m minipeft …`: parses arguments and calls the lab."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from minipeft.gpt import GPTConfig
from minipeft.lab import compare, finetune, log, memory, parallel, placement, sweep, tasks
from minipeft.peft_model import PeftModel, quantize_model, write_file


def parser() -> argparse.ArgumentParser:
    base = argparse.ArgumentParser(add_help=False)
    base.add_argument(
        "--base",
        default=str(tasks.DATA / "base" / "1m"),
        help="a GPT-2 folder (default: %(default)s)",
    )
    base.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    job = argparse.ArgumentParser(add_help=False, parents=[base])
    job.add_argument("--task", help="a shipped task (default: describe)")
    job.add_argument(
        "--train", metavar="FILE", help="your own task: JSONL of prompt and completion"
    )
    job.add_argument("--validation", metavar="FILE", help="its validation part")
    steps = int(os.environ.get("MINIPEFT_STEPS", 100))  # for a quick look, and for CI
    job.add_argument(
        "--steps", type=int, default=steps, help="training steps (default: %(default)s)"
    )
    job.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    job.add_argument(
        "--accumulation", type=int, default=1, help="micro-batches a step (default: %(default)s)"
    )
    job.add_argument(
        "--examples", type=int, metavar="N", help="the first N training examples (default: all)"
    )
    job.add_argument(
        "--generated", type=int, default=64, help="test examples (default: %(default)s)"
    )
    job.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="keep only the blocks' inputs for the backward pass; less memory, more time",
    )
    top = argparse.ArgumentParser(prog="python -m minipeft", description="PEFT methods, measured.")
    commands = top.add_subparsers(dest="command", required=True)
    swept = ",".join(finetune.swept_methods())

    c = commands.add_parser("compare", parents=[job], help="methods against full fine-tuning")
    c.add_argument("--methods", default=swept, help="default: %(default)s")
    c.add_argument("--seeds", type=int, default=1, help="seeds a method (default: %(default)s)")
    places = ", ".join(finetune.TARGETS)
    c.add_argument(
        "--targets",
        metavar="PLACES",
        help=f"put adapters there, with equal numbers of parameters; some of {places}",
    )
    c.add_argument(
        "--full",
        action="store_true",
        help="the README's run: the 3M base, three seeds, every test example",
    )
    c.add_argument("--output", default="out/compare", help="default: %(default)s")

    f = commands.add_parser(
        "finetune", parents=[job], help="train one method, save what it learned"
    )
    f.add_argument(
        "--method", default="lora", choices=[m for m in finetune.METHODS if m != "frozen"]
    )
    f.add_argument("--learning-rate", type=float, help="default: the sweep's best")
    f.add_argument("--size", type=int, help="rank, width or virtual tokens (default: the method's)")
    f.add_argument("--seed", type=int, default=0)
    f.add_argument(
        "--targets", choices=finetune.TARGETS, help="where a weight method's adapters go"
    )
    f.add_argument(
        "--checkpoint-every", type=int, default=100, metavar="N",
        help="steps between two saves of the run's state (default: %(default)s)",
    )  # fmt: skip
    f.add_argument("--resume", action="store_true", help="go on with the stopped run in --output")
    f.add_argument(
        "--shard", action="store_true", help="cut the model over torchrun's processes (full, lora)"
    )
    f.add_argument("--log-dir", metavar="FOLDER", help="log to TensorBoard as well")
    f.add_argument("--output", required=True, help="the folder to write")

    w = commands.add_parser(
        "sweep", parents=[job], help="learning rates and sizes of a method, on a grid"
    )
    w.add_argument(
        "--method", default="lora", choices=[m for m in finetune.METHODS if m != "frozen"]
    )
    w.add_argument(
        "--learning-rates", default="2.5e-3,5e-3,1e-2,2e-2,4e-2", help="default: %(default)s"
    )
    w.add_argument(
        "--sizes", default="", help="ranks, widths or virtual tokens (default: the method's)"
    )
    w.add_argument("--seeds", type=int, default=1, help="seeds a point (default: %(default)s)")
    w.add_argument(
        "--random-base", action="store_true", help="on a model that was never pretrained"
    )
    w.add_argument(
        "--trials", type=int, metavar="N", help="N trials of Optuna within the grid's ends"
    )
    w.add_argument("--output", default="out/sweep", help="for sweep.png (default: %(default)s)")
    w.add_argument(
        "--results", default=str(finetune.SWEEPS), help="the file to write (default: %(default)s)"
    )

    p = commands.add_parser("pretrain", help="a small GPT and its tokenizer from a text file")
    p.add_argument("--text", required=True, help=f"plain text; {tasks.END} divides documents")
    p.add_argument("--output", required=True, help="the folder to write")
    p.add_argument("--steps", type=int, default=2000, help="default: %(default)s")
    for name, value in (("vocab-size", 2048), ("n-embd", 128), ("n-layer", 4), ("n-head", 4)):
        p.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    p.add_argument(
        "--n-positions", type=int, default=256, help="the context (default: %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")

    g = commands.add_parser("generate", parents=[base], help="continue a prompt")
    g.add_argument("--adapter", metavar="FOLDER", help="an adapter to put on the base")
    four_bits = {"action": "store_true", "help": "quantize the base first, as QLoRA did"}
    g.add_argument("--4bit", dest="four_bits", **four_bits)
    g.add_argument("--prompt", required=True)
    g.add_argument("--max-new-tokens", type=int, default=60, help="default: %(default)s")
    g.add_argument("--temperature", type=float, help="sample (default: greedy)")
    g.add_argument("--top-k", type=int)
    g.add_argument("--seed", type=int, default=0)

    y = commands.add_parser("memory", help="where the bytes go, by model shape and method")
    y.add_argument("--shapes", default=",".join(memory.SHAPES), help="default: %(default)s")
    y.add_argument("--methods", default=",".join(memory.METHODS), help="default: %(default)s")
    y.add_argument("--rank", type=int, default=8, help="of the adapters (default: %(default)s)")
    y.add_argument("--batch-size", type=int, default=1, help="default: %(default)s")
    y.add_argument("--length", type=int, default=256, help="tokens (default: %(default)s)")
    y.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, default=True,
        help="keep only the blocks' inputs (default: yes; our own bases keep all)",
    )  # fmt: skip
    y.add_argument("--output", default="out/memory", help="default: %(default)s")

    commands.add_parser(
        "targets", parents=[base], help="list what adapters can be put on in a base"
    )

    m = commands.add_parser(
        "merge", parents=[base], help="write a base with an adapter merged into it"
    )
    m.add_argument("--adapter", metavar="FOLDER", required=True)
    m.add_argument("--4bit", dest="four_bits", **four_bits)
    m.add_argument("--output", required=True, help="the folder to write")
    return top


def open_job(args) -> tuple[finetune.Base, tasks.Task, dict]:
    base = finetune.load_base(args.base)
    name = args.task or (None if args.train or args.validation else "describe")
    limit = base.model().config.n_positions
    task = tasks.load_task(base.tokenizer, base.end, limit, name, args.train, args.validation)
    if args.examples is not None:
        if not 0 < args.examples <= len(task.train):
            raise ValueError(f"--examples {args.examples}: there are {len(task.train)}")
        task = replace(task, train=task.train[: args.examples])
    names = ("batch_size", "accumulation", "generated", "gradient_checkpointing", "device")
    return base, task, {name: getattr(args, name) for name in names}


def check_outputs(args) -> None:
    """Raises ValueError, before any work, where a command could not write what it makes."""
    for name in ("output", "log_dir"):
        if getattr(args, name, None) is not None:
            log.check_writable(getattr(args, name))
    if args.command == "sweep":
        log.check_writable(Path(args.results).parent)
        if Path(args.results).is_dir():
            raise ValueError(f"--results {args.results} is a folder: name a file")


def run(args) -> None:
    check_outputs(args)
    if args.command == "compare":
        if args.full:
            args.base, args.seeds, args.generated = str(tasks.DATA / "base" / "3m"), 3, 200
        base, task, options = open_job(args)
        methods = [method for method in args.methods.split(",") if method]
        for method in set(methods) - set(finetune.METHODS):
            raise ValueError(f"no method {method!r}; there are: {', '.join(finetune.METHODS)}")
        places = args.targets.split(",") if args.targets else None
        records = compare.compare(
            base, task, methods, args.steps, args.seeds, targets=places, **options
        )
        compare.save(records, task, args.output)
        print(compare.show_examples(records))
        print(
            f"\n{compare.table(records, task)}\n\nwrote {args.output}/compare.json and compare.png"
        )
    elif args.command == "finetune":
        args.device = parallel.start(args.device)
        base, task, options = open_job(args)
        record = finetune.finetune(
            base, task, args.method, args.steps, args.seed, args.learning_rate, args.size,
            targets=args.targets, output=args.output, checkpoint_every=args.checkpoint_every,
            resume=args.resume, log_dir=args.log_dir, shard=args.shard, **options,
        )  # fmt: skip
        text = json.dumps(record, indent=1) + "\n"
        if parallel.rank() == 0:
            write_file(Path(args.output) / "record.json", lambda file: Path(file).write_text(text))
            print(
                f"{task.metric} {record['score']:.3f}, BLEU-4 {record['bleu']:.3f}; {args.output}"
            )
        parallel.stop()
    elif args.command == "sweep":
        base, task, options = open_job(args)
        rates = [float(rate) for rate in args.learning_rates.split(",")]
        sizes = [int(size) for size in args.sizes.split(",") if size]
        entries = sweep.sweep(
            base, task, args.method, rates, sizes, args.steps, args.seeds, args.trials,
            args.random_base, **options,
        )  # fmt: skip
        print(sweep.table(entries))
        file = Path(args.output) / "sweep.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        figure = sweep.picture(entries)
        write_file(file, lambda path: figure.savefig(path, format="png", dpi=100))
        sweep.save(entries, args.results)
        print(f"wrote {file} and {args.results}")
    elif args.command == "memory":
        found, measured = memory.of(
            args.shapes.split(","), args.methods.split(","), args.rank, args.batch_size,
            args.length, args.checkpointing,
        )  # fmt: skip
        memory.save(found, measured, args.output)
        print(f"{memory.table(found)}\n")
        if measured:
            print(f"the same, measured in one step on the CPU:\n\n{memory.table(measured)}\n")
        print(f"wrote {args.output}/memory.json and memory.png")
    elif args.command == "targets":
        model = finetune.GPT.from_pretrained(args.base)
        print(placement.table(placement.list_targets(model)))
    elif args.command == "pretrain":
        documents = tasks.read_text(args.text)
        tokenizer = tasks.train_tokenizer(documents, args.vocab_size)
        names = ("n_positions", "n_embd", "n_layer", "n_head")
        config = GPTConfig(
            vocab_size=args.vocab_size, bos_token_id=0, eos_token_id=0, initializer_range=0.06,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
            **{name: getattr(args, name) for name in names},
        )  # fmt: skip
        model, record = finetune.pretrain(
            documents, config, tokenizer, args.steps,
            window=min(128, args.n_positions), seed=args.seed, device=args.device,
        )  # fmt: skip
        model.save_pretrained(args.output)
        tokenizer.save(str(Path(args.output) / "tokenizer.json"))
        print(f"last loss {record['losses'][-1]:.3f}; wrote {args.output}")
    else:
        base = finetune.load_base(args.base)
        model = base.model().to(
            finetune.pick_device(args.device if args.command == "generate" else "cpu")
        )
        if args.four_bits:
            quantize_model(model)
        if args.adapter:
            model = PeftModel.from_pretrained(model, args.adapter)
        if args.command == "merge":
            model.merge_and_unload(inplace=True).save_pretrained(args.output)
            tasks.copy_tokenizer(args.base, args.output)
            print(f"wrote {args.output}")
            return
        ids = torch.tensor([base.tokenizer.encode(args.prompt).ids], device=model.device)
        sampling = {"do_sample": args.temperature is not None, "top_k": args.top_k}
        generator = torch.Generator(model.device).manual_seed(args.seed)
        out = model.generate(
            ids, max_new_tokens=args.max_new_tokens, temperature=args.temperature or 1.0,
            generator=generator, **sampling,
        )  # fmt: skip
        print(base.tokenizer.decode(out[0].tolist()))


def main() -> None:
    args = parser().parse_args()
    try:
        run(args)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stopped:
        how = " Its state is kept: go on with --resume." if args.command == "finetune" else ""
        print(f"\n{stopped or 'stopped'}.{how}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
