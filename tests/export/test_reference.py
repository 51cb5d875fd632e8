"""The paper's PyTorch files: what is written there, what is read here, and a run that goes on from them."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the paper's code writes PyTorch files")

from sapt_jax import continual  # noqa: E402
from sapt_jax.data.pseudo_samples import PseudoSamples, read_pseudo_samples  # noqa: E402
from sapt_jax.data.task import Instance  # noqa: E402
from sapt_jax.export import reference  # noqa: E402
from sapt_jax.export.learned import read_run  # noqa: E402
from sapt_jax.export.selector import query_projection  # noqa: E402
from sapt_jax.pseudo_samples.written_samples import pool_file, pool_json  # noqa: E402
from sapt_jax.state import Task  # noqa: E402
from sapt_jax.storage import task_folders  # noqa: E402
from sapt_jax.storage.paths import as_path  # noqa: E402
from sapt_jax.storage.text_files import write_text_atomically  # noqa: E402
from tests.helpers.learned_runs import HIDDEN, RANK, TASKS, make_base, make_config, make_run  # noqa: E402
from tests.helpers.run_files import assert_same_arrays, committed  # noqa: E402
from tests.helpers.tiny import tiny_config, write_tasks  # noqa: E402

pytestmark = pytest.mark.slow


def load(file):
    return torch.load(file, weights_only=True)


def folders(out, tasks=TASKS):
    return [out / f"{number}-{task}" / "saved_weights" for number, task in enumerate(tasks, start=1)]


@pytest.fixture(scope="module", params=["t5 square", "llama grouped"])
def written(request, tmp_path_factory):
    """(family, folder with base and run, what the run learned, the folder written from it)."""
    folder = tmp_path_factory.mktemp("written")
    _, run = make_run(folder, request.param, "lora")
    pool = PseudoSamples("Say what.", (Instance("0", "a cat", ("",)),))
    folder_of_task = task_folders.task_folder(as_path(run), 0, TASKS[0])
    write_text_atomically(pool_file(folder_of_task, "", TASKS[0]), pool_json(pool))
    learned = read_run(run)
    reference.write_saved(learned, folder / "outputs")
    return request.param, folder, learned, folder / "outputs"


def test_names_shapes_and_values(written):
    family, _, learned, out = written
    if family == "t5 square":
        names = [
            *((f"encoder.block.{n}.layer.0.SelfAttention", ("encoder", "attention"), n) for n in range(2)),
            *((f"decoder.block.{n}.layer.0.SelfAttention", ("decoder", "self_attention"), n) for n in range(2)),
            *(
                (f"decoder.block.{n}.layer.1.EncDecAttention", ("decoder", "encoder_decoder_attention"), n)
                for n in range(2)
            ),
        ]
    else:
        names = [(f"model.layers.{n}.self_attn", ("decoder", "self_attention"), n) for n in range(3)]
    for task, folder in enumerate(folders(out)):
        a, b = load(folder / "lora_weights_A.pt"), load(folder / "lora_weights_B.pt")
        assert set(a) == {f"{module}.lora_{letter}.lora_A" for module, _, _ in names for letter in "qv"}
        assert set(b) == {f"{module}.lora_{letter}.lora_B" for module, _, _ in names for letter in "qv"}
        for module, (stack, attention), layer in names:
            for letter, projection in (("q", "query"), ("v", "value")):
                block = learned.frozen.bank[stack]["layers"][attention][projection]
                stored = a[f"{module}.lora_{letter}.lora_A"]
                assert stored.shape[0] == RANK and stored.dtype == torch.float32
                np.testing.assert_array_equal(stored.numpy(), block["a"][layer, :, task].T)
                np.testing.assert_array_equal(b[f"{module}.lora_{letter}.lora_B"], block["b"][layer, task].T)
        keys = load(folder / "prompts_keys_till_now.pt")
        np.testing.assert_array_equal(keys, learned.frozen.memory["keys"][: task + 1][::-1])
        # As the paper's code reads it, with numpy's old module name for the numpy of its time.
        content = (folder / "attention_weights.pkl").read_bytes()
        assert b"numpy.core" in content and b"numpy._core" not in content
        weights = pickle.loads(content)
        np.testing.assert_array_equal(weights, learned.frozen.memory["reflection_targets"][task, : task + 1][::-1])


def test_written_pools_have_the_three_files_that_the_papers_loader_opens(written):
    _, folder, _, out = written
    pools = out / "generated_data"
    assert [task.name for task in pools.iterdir()] == [TASKS[0]]
    train, dev, test = ((pools / TASKS[0] / f"{split}.json").read_bytes() for split in ("train", "dev", "test"))
    assert train == dev == test
    samples = read_pseudo_samples(pools, TASKS[0])
    assert (samples.definition, [row.input for row in samples.instances]) == ("Say what.", ["a cat"])


def test_the_files_give_our_attention_in_pytorch(written):
    _, _, learned, out = written
    d_model = learned.shape.d_model
    projection = torch.nn.Sequential(
        torch.nn.Linear(d_model, HIDDEN, bias=False),
        torch.nn.Linear(HIDDEN, d_model, bias=False),
        torch.nn.SiLU(),
        torch.nn.LayerNorm(d_model),
    )
    pooled = np.random.default_rng(0).normal(size=(6, d_model)).astype(np.float32)
    for task, folder in enumerate(folders(out)):
        projection.load_state_dict(load(folder / "trans_input.pt"))
        with torch.no_grad():
            scores = projection(torch.tensor(pooled)) @ load(folder / "prompts_keys_till_now.pt").T / d_model**0.5
        place = Task(np.int32(task), np.int32(task), np.int32(0))
        ours = np.exp(learned.method.log_weights(learned.frozen, learned.trainables[task], pooled, place))
        np.testing.assert_allclose(scores.softmax(dim=-1).numpy()[:, ::-1], ours[:, : task + 1], atol=1e-5)


def test_there_and_back_is_exact(written, tmp_path):
    _, folder, learned, out = written
    reference.read_saved(folders(out), str(folder / "base"), learned.config, tmp_path / "back")
    assert len(committed(folder / "run")) == len(TASKS)
    assert_same_arrays(committed(folder / "run"), committed(tmp_path / "back"))


def test_files_as_the_paper_writes_them(written, tmp_path):
    """bfloat16 (its LLaMA), blocks of earlier tasks beside the own ones, float64 attention, folders without numbers."""
    family, folder, learned, out = written
    saved = []
    for index, source in enumerate(folders(out)):
        saved.append(tmp_path / TASKS[index])
        saved[-1].mkdir()
        for name in ("lora_weights_A.pt", "lora_weights_B.pt", "trans_input.pt"):
            state = {key: tensor.bfloat16() for key, tensor in load(source / name).items()}
            if name != "trans_input.pt":
                earlier = {
                    key.replace("lora_q.", "previous_lora_weights_q.0."): tensor + 1
                    for key, tensor in state.items()
                    if "lora_q." in key
                }
                state |= earlier if index else {}
            torch.save(state, saved[-1] / name)
        torch.save(load(source / "prompts_keys_till_now.pt").bfloat16(), saved[-1] / "prompts_keys_till_now.pt")
        attention = pickle.loads((source / "attention_weights.pkl").read_bytes()).astype(np.float64)
        (saved[-1] / "attention_weights.pkl").write_bytes(pickle.dumps(attention))
    reference.read_saved(saved, str(folder / "base"), learned.config, tmp_path / "back")
    back = read_run(tmp_path / "back")
    rounded = jax.tree.map(lambda x: np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float32), learned.trainables)
    jax.tree.map(np.testing.assert_array_equal, list(back.trainables), list(rounded))
    jax.tree.map(np.testing.assert_array_equal, *(x.frozen.memory["reflection_targets"] for x in (back, learned)))


def test_the_config_says_what_the_files_say(written, tmp_path):
    _, folder, _, out = written
    config = make_config("elsewhere", "prompt", **{"task_order": "other", "pet.rank": 7, "sapt.query_hidden": 9})
    recorded = reference.read_saved(folders(out), str(folder / "base"), config, tmp_path / "back")
    assert (recorded.pet.kind, recorded.pet.rank, recorded.sapt.query_hidden) == ("lora", RANK, HIDDEN)
    assert recorded.task_order == ",".join(TASKS) and recorded.model.path == str(folder / "base")
    assert read_run(tmp_path / "back").config == recorded
    assert config.pet.kind == "prompt", "the caller's config was changed"


class Bomb:
    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def test_bad_files(written, tmp_path):
    family, folder, learned, out = written
    back = tmp_path / "back"
    Bomb.mark = tmp_path / "ran"

    def message(saved, base=folder / "base", error=ValueError):
        with pytest.raises(error) as raised:
            reference.read_saved(saved, str(base), learned.config, back)
        assert not list(tmp_path.glob("back*")) and not Bomb.mark.exists()
        return str(raised.value)

    def damaged(name, content):
        """The saved folders with one file of the second task replaced."""
        copy = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "2-second" / "saved_weights"
        copy.mkdir(parents=True)
        for file in folders(out)[1].iterdir():
            (copy / file.name).symlink_to(file)
        (copy / name).unlink()
        if isinstance(content, bytes):
            (copy / name).write_bytes(content)
        elif content is not None:
            torch.save(content, copy / name)
        return [folders(out)[0], copy]

    assert "lacks attention_weights.pkl" in message(damaged("attention_weights.pkl", None), error=FileNotFoundError)
    assert "does not exist" in message([tmp_path / "nowhere"], error=FileNotFoundError)
    bomb = damaged("attention_weights.pkl", pickle.dumps(Bomb()))
    assert "it names builtins.exec" in message(bomb)
    assert "cannot be read as plain torch tensors" in message(damaged("lora_weights_A.pt", pickle.dumps(Bomb())))
    assert "cannot be read as plain torch tensors" in message(damaged("trans_input.pt", {"0.weight": Bomb()}))
    short = pickle.dumps(np.ones(1))
    assert "holds [1], not one weight for 2 tasks" in message(damaged("attention_weights.pkl", short))
    for weights in ([np.nan, 0.5], [-0.5, 1.5], [1.0, 1.0], [np.inf, 0.0]):
        content = pickle.dumps(np.array(weights))
        assert "second: its recorded attention" in message(damaged("attention_weights.pkl", content))
    state = load(folders(out)[1] / "lora_weights_B.pt")
    name = next(iter(state))
    greedy = {**state, name: state[name][:1].as_strided((2**40, RANK), (0, 1))}
    assert "sparse or larger than the file" in message(damaged("lora_weights_B.pt", greedy))
    endless = {**state, name: torch.full_like(state[name], torch.nan)}
    assert "second: its block, key or query projection holds NaN" in message(damaged("lora_weights_B.pt", endless))
    assert f"missing: {name}" in message(damaged("lora_weights_B.pt", {k: v for k, v in state.items() if k != name}))
    assert f"unknown: {name}.bias" in message(damaged("lora_weights_B.pt", {**state, f"{name}.bias": state[name]}))
    assert f"{name} is [1, {RANK}], not" in message(damaged("lora_weights_B.pt", {**state, name: state[name][:1]}))
    keys = load(folders(out)[1] / "prompts_keys_till_now.pt")
    assert "not those of the folder before" in message(damaged("prompts_keys_till_now.pt", keys.flip(0)))
    assert "in the order that they were trained in" in message(folders(out)[::-1])
    make_base("llama" if family == "t5 square" else "t5", tmp_path / "other")
    assert "--base their model" in message(folders(out), base=tmp_path / "other")
    if family != "t5 square":
        # As wide, with more value heads.
        make_base("llama", tmp_path / "same kind")
        assert "lora_v.lora_B is [16, 2], not [32, 2]" in message(folders(out), base=tmp_path / "same kind")


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "prompt").mkdir()
    _, run = make_run(tmp_path / "prompt", "llama", "prompt")
    with pytest.raises(ValueError, match="no soft prompts: to-peft or to-torch"):
        reference.write_saved(read_run(run), tmp_path / "outputs")
    for name, family, overrides, message in [
        ("sum", "llama", {"method": "inc_lora"}, "inc_lora.*has neither keys nor a query projection"),
        ("more", "llama", {"pet.targets": r".*/(query|value|out)/kernel"}, "on query and value of every attention"),
        ("less", "t5 square", {"pet.targets": r"decoder/.*/(query|value)/kernel"}, "on query and value of every"),
        ("narrow", "llama", {"sapt.query_hidden": 5}, "a query projection 100 wide, config.sapt.query_hidden=5"),
        ("t5", "t5", {}, "are 32 and 16 wide: to-torch takes it"),
    ]:
        (tmp_path / name).mkdir()
        _, run = make_run(tmp_path / name, family, "lora", **overrides)
        with pytest.raises(ValueError, match=message):
            reference.write_saved(read_run(run), tmp_path / "outputs")
    (tmp_path / "sequential").mkdir()
    _, run = make_run(tmp_path / "sequential", "llama", "lora", method="sequential")
    with pytest.raises(ValueError, match="sequential.*keeps one block for all tasks"):
        reference.write_saved(read_run(run), tmp_path / "outputs")
    assert not list(tmp_path.glob("outputs*"))


def test_a_run_goes_on_from_imported_files(tmp_path):
    tasks = ("shout", "mirror")
    data = write_tasks(tmp_path / "data", train=10, test=2)
    base = tmp_path / "base"
    overrides = {"model.variant": "", "model.path": str(base), "train.epochs": 1, "task_order": ",".join(tasks)}
    make_run(tmp_path, "llama of bytes", "lora", tasks=tasks, task_order=",".join(tasks))
    reference.write_saved(read_run(tmp_path / "run"), tmp_path / "outputs")
    config = tiny_config(data, **{**overrides, "sapt.query_hidden": HIDDEN})
    workdir = tmp_path / "back"
    recorded = reference.read_saved(folders(tmp_path / "outputs", tasks), str(base), config, workdir)
    before = read_run(workdir)
    recorded.task_order = "shout,mirror,first"
    scores = continual.run(recorded, workdir)
    assert np.isfinite(np.array(scores["matrix"])[np.tril_indices(3)]).all()
    after = read_run(workdir)
    assert after.tasks == ("shout", "mirror", "first")
    jax.tree.map(np.testing.assert_array_equal, list(after.trainables[:2]), list(before.trainables))
    np.testing.assert_array_equal(after.frozen.memory["keys"][:2], before.frozen.memory["keys"])
    targets, were = (x.frozen.memory["reflection_targets"] for x in (after, before))
    np.testing.assert_array_equal(targets[:2, :2], were)
    # The third task opened a block of its own and went on training the projection that was imported.
    assert all(np.any(leaf) for leaf in jax.tree.leaves(after.trainables[2].slot))
    down, was = (query_projection(one.selector)["down"] for one in (after.trainables[2], before.trainables[1]))
    moved = np.abs(down - was)
    assert 0 < moved.max() < 0.2
