"""`python -m minipeft …`: parses arguments and calls the lab. torch is imported only to do work."""

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

from minipeft import __version__
from minipeft.lab import DATA
from minipeft.lab.recipes import RECIPES, TARGETS, RunConfig, swept_methods

ONE_RUN = {  # fields of RunConfig that are options of `finetune`, but not of `compare` and `sweep`
    "learning_rate", "seed", "n_evaluations", "random_base", "shard", "output", "checkpoint_every",
    "resume", "quiet", "lr_end", "beta2",
}  # fmt: skip


def add_option(parser: argparse.ArgumentParser, flag: str, default, help: str, **more) -> None:
    """Add an option with the type of its default, which the help text shows."""
    if default is False:
        parser.add_argument(flag, action="store_true", help=help)
        return
    if default is not None:
        more = {"type": type(default)} | more
        help += " (default: %(default)s)"
    parser.add_argument(flag, default=default, help=help, **more)


def add_fields(parser: argparse.ArgumentParser, names: set[str], **defaults) -> None:
    """Add an option for each of these fields of RunConfig."""
    for field in fields(RunConfig):
        if field.name in names:
            flag = f"--{field.name.replace('_', '-')}"
            kind = next(k for k in (bool, int, float, str) if k.__name__ in str(field.type))
            default = defaults.get(field.name, field.default)
            add_option(parser, flag, default, field.metadata["help"], type=kind)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("minipeft", description="PEFT methods, trained and measured.")
    top.add_argument("--version", action="version", version=f"minipeft {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, help: str, *parents) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=parents, help=help, description=help.capitalize())

    base = argparse.ArgumentParser(add_help=False)
    add_option(base, "--base", str(DATA / "base" / "1m"), "a GPT-2 folder", metavar="FOLDER")
    any_base = argparse.ArgumentParser(add_help=False, parents=[base])
    add_option(any_base, "--4bit", False, "quantize the base first, as QLoRA does")
    job = argparse.ArgumentParser(add_help=False, parents=[base])
    add_option(job, "--task", None, "a shipped task; without it and --train, describe")
    add_option(job, "--train", None, "your own task: JSONL of prompt, completion", metavar="FILE")
    add_option(job, "--validation", None, "its validation examples", metavar="FILE")
    add_option(job, "--test", None, "its test examples; without this file, every second validation "
               "example is kept for the test", metavar="FILE")  # fmt: skip
    common = {field.name for field in fields(RunConfig)} - ONE_RUN
    add_fields(job, common, steps=int(os.environ.get("MINIPEFT_STEPS", 100)))
    trainable = [method for method in RECIPES if method != "frozen"]

    command = add_command("compare", "methods against full fine-tuning", job)
    add_option(command, "--methods", ",".join(swept_methods()), "a list of methods")
    add_option(command, "--seeds", 1, "seeds per method")
    add_option(command, "--targets", None, "put adapters there, with equal numbers of parameters; "
               f"a list from {', '.join(TARGETS)}", metavar="PLACES")  # fmt: skip
    add_option(command, "--full", False, "the README's run: 3M base, three seeds, the whole test")
    add_option(command, "--output", "out/compare", "the folder to write")

    command = add_command("finetune", "train one method and save the result", job)
    add_option(command, "--method", "lora", "the method", choices=trainable)
    add_option(command, "--size", None, "rank, width or virtual tokens", type=int)
    add_option(command, "--targets", None, "where a weight method's adapters go", choices=TARGETS)
    add_fields(command, ONE_RUN)

    command = add_command("sweep", "learning rates and sizes of a method, on a grid", job)
    add_option(command, "--method", "lora", "the method", choices=trainable)
    add_option(command, "--learning-rates", "2.5e-3,5e-3,1e-2,2e-2,4e-2", "a list")
    add_option(command, "--sizes", None, "a list of ranks, widths or numbers of virtual tokens")
    add_option(command, "--seeds", 1, "seeds per point")
    add_option(command, "--output", "out/sweep", "the folder for sweep.png")
    add_option(command, "--results", None, "add to this file; without it, OUTPUT/sweep.json")
    add_fields(command, {"random_base"})

    command = add_command("pretrain", "a small GPT and its tokenizer from a text file")
    add_option(command, "--text", None, "documents with <|endoftext|> between them", required=True)
    add_option(command, "--output", None, "the folder to write", required=True)
    sizes = {"vocab-size": 2048, "n-positions": 256, "n-embd": 128, "n-layer": 4, "n-head": 4}
    for name, size in sizes.items():
        add_option(command, f"--{name}", size, "of the GPT")
    add_fields(command, {"steps", "seed", "device"}, steps=2000)

    command = add_command("generate", "continue a prompt", any_base)
    add_option(command, "--adapter", None, "an adapter to add to the base", metavar="FOLDER")
    add_option(command, "--prompt", None, "the text to continue", required=True)
    add_option(command, "--max-new-tokens", 60, "tokens to generate at most")
    add_option(command, "--temperature", None, "sample; without it, greedy decoding", type=float)
    add_option(command, "--top-k", None, "sample from the k most likely tokens", type=int)
    add_fields(command, {"seed", "device"})

    command = add_command("memory", "where the bytes go, by model shape and method")
    add_option(command, "--shapes", None, "a list of shapes; without it, all")
    add_option(command, "--methods", None, "a list from full, lora, qlora; without it, all")
    add_option(command, "--rank", 8, "of the adapters")
    add_option(command, "--batch-size", 1, "sequences")
    add_option(command, "--length", 256, "tokens per sequence")
    add_option(command, "--no-checkpointing", False, "keep all activations for the backward pass")
    add_option(command, "--output", "out/memory", "the folder to write")

    add_command("targets", "list the layers of a base that adapters can go on", base)

    command = add_command("merge", "write a base with an adapter merged into it", any_base)
    add_option(command, "--adapter", None, "the adapter", metavar="FOLDER", required=True)
    add_option(command, "--output", None, "the folder to write", required=True)
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
        return opened, tasks.load_task(opened, args.task or "describe")
    if args.task or not (args.train and args.validation):
        raise ValueError("give --task NAME, or --train FILE and --validation FILE")
    return opened, tasks.load_files(opened, *files)


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
    from minipeft.files import write_file
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

    results = Path(args.results or Path(args.output) / "sweep.json")
    check_folder(results.parent)
    if results.is_dir():
        raise ValueError(f"--results {results} is a folder: name a file")
    base, task = open_job(args)
    rates = [float(rate) for rate in args.learning_rates.split(",")]
    sizes = [int(size) for size in args.sizes.split(",")] if args.sizes else []
    run, grid = run_config(args, output=None), sweep.Grid(rates, sizes, args.seeds)
    entries = sweep.sweep(base, task, RECIPES[args.method], run, grid)
    print(sweep.table(entries))
    sweep.save(entries, results)
    report.save_figure(report.sweep_figure(entries), Path(args.output) / "sweep.png")
    print(f"wrote {args.output}/sweep.png and {results}")


def memory(args) -> None:
    from minipeft.lab import memory

    shapes = args.shapes.split(",") if args.shapes else list(memory.SHAPES)
    methods = args.methods.split(",") if args.methods else list(memory.METHODS)
    settings = args.rank, args.batch_size, args.length, not args.no_checkpointing
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
    model = quantize_model(model) if vars(args)["4bit"] else model
    return opened, PeftModel.from_pretrained(model, args.adapter) if args.adapter else model


def generate(args) -> None:
    import torch

    from minipeft.lab.base import encode_prompt

    base, model = open_model(args, args.device)
    ids = torch.tensor([encode_prompt(base.tokenizer, args.prompt)], device=model.device)
    sampling = {"max_new_tokens": args.max_new_tokens, "top_k": args.top_k}
    if args.temperature is not None:
        torch.manual_seed(args.seed)
        sampling |= {"do_sample": True, "temperature": args.temperature}
    elif args.top_k is not None:
        raise ValueError("--top-k needs --temperature: greedy decoding does not sample")
    print(base.tokenizer.decode(model.generate(ids, **sampling)[0].tolist()))


def merge(args) -> None:
    from minipeft.lab.base import copy_tokenizer

    opened, model = open_model(args, "cpu")
    model.merge_and_unload(inplace=True).save_pretrained(args.output)
    copy_tokenizer(opened, args.output)
    print(f"wrote {args.output}")


def check_folder(folder: Path) -> None:
    """Raises ValueError, before any work, if results could not be written to a folder."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ValueError(f"cannot write to {folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {folder}: no permission to write to {existing}")


def main() -> None:
    args = parser().parse_args()
    try:
        if getattr(args, "output", None) is not None:
            check_folder(Path(args.output))
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
