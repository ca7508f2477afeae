"""`python -m minipeft …`: parses arguments and calls the lab. torch is imported only to do work."""

import argparse
import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

from minipeft import __version__
from minipeft.lab import DATA
from minipeft.lab.recipes import RECIPES, TARGETS, RunConfig, swept_methods

ONE_RUN = {  # fields of RunConfig that are options of `finetune` only, and not of all jobs
    "learning_rate", "seed", "n_evaluations", "random_base", "shard", "output", "checkpoint_every",
    "resume", "log_dir", "quiet", "lr_end", "beta2",
}  # fmt: skip


def add_fields(parser: argparse.ArgumentParser, names: set[str], **defaults) -> None:
    """Add an option for each of these fields of RunConfig."""
    for field in fields(RunConfig):
        if field.name in names:
            flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
            default = defaults.get(field.name, field.default)
            if field.type is bool:
                parser.add_argument(flag, action="store_true", help=text)
                continue
            kind = next(k for k in (int, float, str) if k.__name__ in str(field.type))
            shown = "" if default is None else " (default: %(default)s)"
            parser.add_argument(flag, type=kind, default=default, help=text + shown)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("minipeft", description="PEFT methods, trained and measured.")
    top.add_argument("--version", action="version", version=f"minipeft {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *parents):
        """A new command, and a function that adds options to it."""
        made = commands.add_parser(name, parents=parents, help=help, description=help.capitalize())

        def add(flag: str, default=None, help: str = "", **more) -> None:
            kind = {} if default is None or "action" in more else {"type": type(default)}
            shown = "" if default is None else " (default: %(default)s)"
            made.add_argument(flag, default=default, help=help + shown, **kind | more)

        return made, add

    base = argparse.ArgumentParser(add_help=False)
    base.add_argument("--base", default=str(DATA / "base" / "1m"), metavar="FOLDER",
                      help="a GPT-2 folder (default: the shipped 1M base)")  # fmt: skip
    coarse = argparse.ArgumentParser(add_help=False, parents=[base])
    coarse.add_argument("--4bit", dest="four_bits", action="store_true",
                        help="quantize the base first, as QLoRA does")  # fmt: skip
    job = argparse.ArgumentParser(add_help=False, parents=[base])
    job.add_argument("--task", help="a shipped task (default: describe)")
    job.add_argument("--train", metavar="FILE", help="your own task: JSONL of prompt, completion")
    job.add_argument("--validation", metavar="FILE", help="its validation examples")
    job.add_argument("--test", metavar="FILE", help="its test examples; without this file, every "
                     "second validation example is kept for the test")  # fmt: skip
    job.add_argument("--examples", type=int, metavar="N", help="use the first N training examples")
    common = {field.name for field in fields(RunConfig)} - ONE_RUN
    add_fields(job, common, steps=int(os.environ.get("MINIPEFT_STEPS", 100)))
    trainable = [method for method in RECIPES if method != "frozen"]

    _, add = command("compare", "methods against full fine-tuning", job)
    add("--methods", ",".join(swept_methods()), "a list of methods")
    add("--seeds", 1, "seeds per method")
    add("--targets", None, "put adapters there, with equal numbers of parameters; a list from "
        f"{', '.join(TARGETS)}", metavar="PLACES")  # fmt: skip
    add("--full", None, "the README's run: 3M base, three seeds, all test examples",
        action="store_true")  # fmt: skip
    add("--output", "out/compare", "the folder to write")

    made, add = command("finetune", "train one method and save the result", job)
    add("--method", "lora", "the method", choices=trainable)
    add("--size", None, "rank, width or virtual tokens", type=int)
    add("--targets", None, "where a weight method's adapters go", choices=TARGETS)
    add_fields(made, ONE_RUN)

    made, add = command("sweep", "learning rates and sizes of a method, on a grid", job)
    add("--method", "lora", "the method", choices=trainable)
    add("--learning-rates", "2.5e-3,5e-3,1e-2,2e-2,4e-2", "a list of learning rates")
    add("--sizes", "", "ranks, widths or virtual tokens")
    add("--seeds", 1, "seeds per point")
    add("--output", "out/sweep", "the folder for sweep.png")
    add(
        "--results", None, "add the results to this file (default: sweep.json in the output folder)"
    )
    add_fields(made, {"random_base"})

    made, add = command("pretrain", "a small GPT and its tokenizer from a text file")
    add("--text", None, "plain text; <|endoftext|> separates documents", required=True)
    add("--output", None, "the folder to write", required=True)
    for name, value in (("vocab-size", 2048), ("n-positions", 256), ("n-embd", 128)):
        add(f"--{name}", value, "of the GPT")
    add("--n-layer", 4, "of the GPT")
    add("--n-head", 4, "of the GPT")
    add_fields(made, {"steps", "seed", "device"}, steps=2000)

    made, add = command("generate", "continue a prompt", coarse)
    add("--adapter", None, "an adapter to add to the base", metavar="FOLDER")
    add("--prompt", None, "the text to continue", required=True)
    add("--max-new-tokens", 60, "tokens to generate at most")
    add("--temperature", None, "sample at this temperature (default: greedy)", type=float)
    add("--top-k", None, "sample from the k most likely tokens", type=int)
    add_fields(made, {"seed", "device"})

    _, add = command("memory", "where the bytes go, by model shape and method")
    add("--shapes", None, "a list of shapes (default: all)")
    add("--methods", None, "a list from full, lora, qlora (default: all)")
    add("--rank", 8, "of the adapters")
    add("--batch-size", 1, "sequences")
    add("--length", 256, "tokens per sequence")
    add("--checkpointing", True, "keep only the blocks' inputs; our own bases keep everything",
        action=argparse.BooleanOptionalAction)  # fmt: skip
    add("--output", "out/memory", "the folder to write")

    command("targets", "list the layers of a base that adapters can go on", base)

    _, add = command("merge", "write a base with an adapter merged into it", coarse)
    add("--adapter", None, "the adapter", metavar="FOLDER", required=True)
    add("--output", None, "the folder to write", required=True)
    return top


def run_config(args, **changes) -> RunConfig:
    """The RunConfig that the options describe."""
    names = {field.name for field in fields(RunConfig)}
    return RunConfig(**{k: v for k, v in vars(args).items() if k in names} | changes)


def open_job(args):
    """The base and the task that the options name."""
    from minipeft.lab import base, tasks

    opened = base.load_base(args.base)
    files = [args.train, args.validation, args.test]
    if not any(files):
        task = tasks.load_task(opened, args.task or "describe")
    elif args.task or not (args.train and args.validation):
        raise ValueError("give --task NAME, or --train FILE and --validation FILE")
    else:
        task = tasks.load_files(opened, *files)
    if args.examples is not None:
        if not 0 < args.examples <= len(task.train):
            raise ValueError(f"--examples must be from 1 to {len(task.train)}, got {args.examples}")
        task = replace(task, train=task.train[: args.examples])
    return opened, task


def compare(args) -> None:
    from minipeft.lab import compare

    if args.full:
        args.base, args.seeds, args.n_generate = str(DATA / "base" / "3m"), 3, 200
    places = args.targets.split(",") if args.targets else []
    methods = args.methods.split(",")
    for names, known in ((methods, RECIPES), (places, TARGETS)):
        for name in set(names) - set(known):
            raise ValueError(f"there is no {name!r}; choose from {', '.join(known)}")
    recipes = []
    for recipe in (RECIPES[method] for method in methods):
        recipes += [recipe.placed(p) for p in places] if places and recipe.has_rank else [recipe]
    base, task = open_job(args)
    records = compare.compare(base, task, recipes, run_config(args, output=None), args.seeds)
    print(compare.show_examples(records))
    print(f"\n{compare.table(records, task)}\n")
    compare.save(records, task, args.output)
    print(f"wrote {args.output}/compare.json and compare.png")


def finetune(args) -> None:
    from minipeft.gpt import write_file
    from minipeft.lab import finetune, parallel

    if args.output is None:
        raise ValueError("--output is missing: name the folder to write")
    args.device = parallel.start(args.device)
    recipe = RECIPES[args.method]
    recipe = recipe if args.size is None else recipe.with_size(args.size)
    recipe = recipe if args.targets is None else recipe.placed(args.targets)
    base, task = open_job(args)
    record = finetune.finetune(base, task, recipe, run_config(args))
    text = json.dumps(record.to_json(), indent=1) + "\n"
    if parallel.rank() == 0:
        write_file(Path(args.output) / "record.json", lambda file: Path(file).write_text(text))
        print(f"{task.metric} {record.score:.3f}; wrote {args.output}")
    parallel.stop()


def sweep(args) -> None:
    from minipeft.lab import report, sweep

    base, task = open_job(args)
    rates = [float(rate) for rate in args.learning_rates.split(",")]
    sizes = [int(size) for size in args.sizes.split(",") if size]
    run, grid = run_config(args, output=None), sweep.Grid(rates, sizes, args.seeds)
    entries = sweep.sweep(base, task, RECIPES[args.method], run, grid)
    print(sweep.table(entries))
    sweep.save(entries, args.results)
    report.save_figure(report.sweep_figure(entries), Path(args.output) / "sweep.png")
    print(f"wrote {args.output}/sweep.png and {args.results}")


def memory(args) -> None:
    from minipeft.lab import memory

    shapes = args.shapes.split(",") if args.shapes else list(memory.SHAPES)
    methods = args.methods.split(",") if args.methods else list(memory.METHODS)
    settings = args.rank, args.batch_size, args.length, args.checkpointing
    found, measured = memory.of(shapes, methods, *settings)
    print(f"{memory.table(found)}\n")
    if measured:
        print(f"the same, measured in one step on the CPU:\n\n{memory.table(measured)}\n")
    memory.save(found, measured, args.output)
    print(f"wrote {args.output}/memory.json and memory.png")


def targets(args) -> None:
    from minipeft.gpt import GPT
    from minipeft.lab.report import markdown_table
    from minipeft.targets import list_targets

    rows = list_targets(GPT.from_pretrained(args.base))
    lines = [[f"{v:,}" if isinstance(v, int) else v for v in row.values()] for row in rows]
    print(markdown_table(rows[0], lines))


def pretrain(args) -> None:
    from minipeft.gpt import GPTConfig
    from minipeft.lab import base, pretrain

    documents = base.read_text(args.text)
    tokenizer = pretrain.train_tokenizer(documents, args.vocab_size)
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    size = {name: getattr(args, name) for name in names}
    run = pretrain.pretraining_run(args.steps, seed=args.seed, device=args.device)
    config = GPTConfig(**size, **pretrain.SETTINGS)
    model, training, _ = pretrain.pretrain(documents, config, tokenizer, run)
    model.save_pretrained(args.output)
    tokenizer.save(str(Path(args.output) / "tokenizer.json"))
    print(f"last loss {training.losses[-1]:.3f}; wrote {args.output}")


def open_model(args, device: str | None):
    """The base, and its model on a device, quantized and adapted as the options say."""
    from minipeft import PeftModel, quantize_model
    from minipeft.lab import base, train

    opened = base.load_base(args.base)
    model = opened.pretrained.to(train.pick_device(device))
    model = quantize_model(model) if args.four_bits else model
    return opened, PeftModel.from_pretrained(model, args.adapter) if args.adapter else model


def generate(args) -> None:
    import torch

    base, model = open_model(args, args.device)
    ids = torch.tensor([base.tokenizer.encode(args.prompt).ids], device=model.device)
    sampling = {"top_k": args.top_k, "max_new_tokens": args.max_new_tokens}
    if args.temperature is not None:
        generator = torch.Generator(model.device).manual_seed(args.seed)
        sampling |= {"do_sample": True, "temperature": args.temperature, "generator": generator}
    elif args.top_k is not None:
        raise ValueError("--top-k needs --temperature: greedy decoding does not sample")
    print(base.tokenizer.decode(model.generate(ids, **sampling)[0].tolist()))


def merge(args) -> None:
    from minipeft.lab.base import copy_tokenizer

    _, model = open_model(args, "cpu")
    model.merge_and_unload(inplace=True).save_pretrained(args.output)
    copy_tokenizer(args.base, args.output)
    print(f"wrote {args.output}")


def check_outputs(args) -> None:
    """Raises ValueError, before any work, if a command could not write its results."""
    folders = [getattr(args, name, None) for name in ("output", "log_dir")]
    if args.command == "sweep":
        args.results = args.results or str(Path(args.output) / "sweep.json")
        folders.append(Path(args.results).parent)
        if Path(args.results).is_dir():
            raise ValueError(f"--results {args.results} is a folder: name a file")
    for folder in [Path(folder) for folder in folders if folder is not None]:
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise ValueError(f"cannot write to {folder}: {existing} is not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"cannot write to {folder}: no permission to write to {existing}")


def main() -> None:
    args = parser().parse_args()
    try:
        check_outputs(args)
        globals()[args.command](args)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stopped:
        saved = Path(getattr(args, "output", None) or "") / "checkpoint.safetensors"
        how = " Its state is saved: continue with --resume." if saved.is_file() else ""
        print(f"\n{stopped or 'stopped'}.{how}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
