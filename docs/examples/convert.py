"""From a checkpoint to text, step by step, from Python.

    python docs/examples/convert.py CHECKPOINT OUT

CHECKPOINT is a folder in the official format, or a repo of the Hub (hf://owner/name). The small one that comes along,
in `manifests/demo`, takes a few seconds. OUT is the folder to write.
"""

# %% What is it?
import sys

import ds4convert as ds4

checkpoint, out = sys.argv[1:3]
source = ds4.open(checkpoint)
print(f"{source.family}, {source.format} format, head: {source.head_kind}")
for problem in source.inspected.problems:
    print(f"  {problem}")

# %% What would a conversion write?
plan = ds4.plan(source, recipe="native", layout="inline", out=".")
facts = plan.as_json()
for group in facts["groups"]:
    print(f"  {group['name']:<28} {group['bytes']:>15,} bytes  {', '.join(group['formats'])}")
print(f"plan {plan.id[:12]}: {plan.output_bytes:,} bytes in {facts['output_shards']} files")


# %% Convert. Run again after an interruption, it goes on.
def show(now):
    """Show how far the conversion is: called with every piece that is done."""
    if now.finished:
        print(f"{now.what}: {now.done:,} of {now.total:,} bytes")


done = ds4.convert(plan, out, jobs=2, progress=show, say=print)
print(f"{done.manifest}: {'was there already' if done.already_done else 'written'}")

# %% Is every value right, and is the head of use?
found = ds4.verify(out, source=source, mtp=True, max_tokens=16)
for check in found.checks:
    print(f"  {'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
print(found.verdict)
assert ds4.diff(source, out).equal

# %% Text, with the head and without.
model = ds4.load(out, dtype="float32")
prompt = "Now after many days the word of the LORD came"
for token in model.stream(prompt, chat=False, max_tokens=24):
    print(token.text, end="", flush=True)
print()
with_head = model.generate(prompt, chat=False, max_tokens=24)
without = model.generate(prompt, chat=False, max_tokens=24, mtp=False)
print(f"the same tokens: {with_head.tokens == without.tokens}; acceptance: {with_head.acceptance}")

# %% Errors are classes, with what they are about beside the message.
try:
    ds4.plan(source, layout="nowhere")
except ds4.UsageError as error:
    print(f"refused: {error}")
