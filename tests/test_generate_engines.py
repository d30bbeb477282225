"""The fast engine writes what generate writes: token for token, whatever the options."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from tinyllm.decode import kernel
from tinyllm.decode.choice import TopKTopP, unsupported_options
from tinyllm.decode.compact import Compact
from tinyllm.decode.fast import FastEngine
from tinyllm.decode.pick import EngineMaker
from tinyllm.decode.plain import PlainEngine
from tinyllm.decode.row import RowDecoder
from tinyllm.decode.side_by_side import num_shared
from tinyllm.decode.weights import unsupported
from tinyllm.errors import UserError

PROMPTS = [[7, 8, 9, 10, 11], [3], [200, 5, 5, 90, 17, 41, 300, 12, 8, 77, 61, 29], [4, 4, 4]]
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": [1, 2], "pad_token_id": 0}
SAMPLED = GREEDY | {"do_sample": True}


@pytest.fixture(scope="module")
def library():
    loaded = kernel.load()
    if loaded is None:
        pytest.skip("there is no C compiler here")
    return loaded


def make_qwen2():
    """A model with biases on queries, keys and values."""
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=480, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            initializer_range=0.2, tie_word_embeddings=False, bos_token_id=None, eos_token_id=1,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for layer in model.model.layers:
            for name in "qkv":
                getattr(layer.self_attn, f"{name}_proj").bias.normal_()
    return model


def make_lora(seed: int = 5):
    """A tiny model with two adapters that change it a good deal."""
    torch.manual_seed(seed)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(make_model(), config)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return model.eval()


MODELS = {
    "tied": make_model,
    "bfloat16 weights": lambda: make_model().bfloat16().float(),
    "no groups": lambda: make_model(num_key_value_heads=4, tie_word_embeddings=False),
    "odd sizes": lambda: make_model(hidden_size=40, intermediate_size=50).bfloat16().float(),
    "biases": make_qwen2,
}


WIDE = {  # wide enough for several threads; (hidden, inner, heads, key/value heads, vocabulary)
    "even": (256, 300, 4, 2, 480),
    "one key head, odd sizes": (264, 257, 3, 1, 480),
    "no groups": (320, 512, 5, 5, 480),
    "narrow, large vocabulary": (64, 172, 4, 2, 8192),
}


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_work(name, threads, library, restored_threads):
    hidden, inner, heads, kv_heads, vocab = WIDE[name]
    model = make_model(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=kv_heads, initializer_range=0.05,
    ).bfloat16().float()  # fmt: skip
    model = get_peft_model(model, LoraConfig(r=5, target_modules="all-linear")).eval()
    for parameter_name, weight in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(weight, std=0.1)
    ids = [(7 + 31 * at) % vocab for at in range(90)]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
        torch.set_num_threads(threads)
        reader = RowDecoder(
            library,
            model.base_model.model,
            "default",
            Compact(library.lanes(), bool(library.packs())),
            128,
        )
        assert reader.model.threads == threads
        for start, end in ((0, 50), (50, 53), (53, 54), (54, 90)):
            found = reader.read(ids[start:end], start)[0]
            torch.testing.assert_close(found, expected[end - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("penalty", [1.0, 1.1])
def test_greedy_tokens_are_those_of_generate(name, compiled, penalty, library):
    model = MODELS[name]()
    engine = EngineMaker(model, "fast", lambda: library if compiled else None).engine()
    assert isinstance(engine, FastEngine) and engine.why.startswith("compiled") == compiled
    config = GenerationConfig(**GREEDY, repetition_penalty=penalty)
    for prompt in PROMPTS:
        assert engine.write(prompt, config) == PlainEngine(model).write(prompt, config)


@pytest.mark.parametrize("adapter", ["default", "other", None])
@pytest.mark.parametrize("compiled", [True, False])
def test_adapters_are_those_of_peft(adapter, compiled, library):
    model = make_lora()
    maker = EngineMaker(model, "fast", lambda: library if compiled else None)
    config = GenerationConfig(**GREEDY)
    for prompt in PROMPTS[:2]:
        expected = maker.plain_engine(adapter, "").write(prompt, config)
        assert maker.engine(adapter).write(prompt, config) == expected
    written = {tuple(maker.engine(a).write(PROMPTS[0], config)) for a in ("default", "other", None)}
    assert len(written) == 3


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6, "top_p": 0.8}, {"top_k": 0, "temperature": 1.7},
     {"top_k": 5, "repetition_penalty": 1.2}, {"min_p": 0.05, "top_k": 20}],
)  # fmt: skip
def test_a_seed_draws_the_tokens_that_generate_draws(options, library):
    model = make_model()
    engine, plain = EngineMaker(model, "fast", lambda: library).engine(), PlainEngine(model)
    config = GenerationConfig(**SAMPLED, **options)
    for seed in range(6):
        torch.manual_seed(seed)
        expected = plain.write(PROMPTS[0], config)
        torch.manual_seed(seed)
        assert engine.write(PROMPTS[0], config) == expected


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(50, 0.9), (5, 0.3), (1, 0.9), (480, 0.95), (999, 0.5)]
)
def test_top_k_then_top_p_is_transformers_own(top_k, top_p, ties):
    torch.manual_seed(top_k)
    scores = torch.randn(40, 480) * torch.linspace(0.1, 6, 40)[:, None]
    if ties:
        scores = scores.round()
    expected = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, scores))
    assert torch.equal(TopKTopP(top_k, top_p)(None, scores), expected)
    for row in range(len(scores)):
        alone = TopKTopP(top_k, top_p)(None, scores[row : row + 1])
        assert torch.equal(alone[0], expected[row])


def test_the_cache_carries_over_what_two_prompts_share(library):
    model = make_model()
    engine = EngineMaker(model, "fast", lambda: library).engine()
    config = GenerationConfig(**GREEDY)
    first = engine.write(PROMPTS[2], config)
    longer = [*PROMPTS[2], *first, 9, 8]
    expected = PlainEngine(model).write(longer, config)
    assert engine.write(longer, config) == expected
    assert engine.num_reused == len(PROMPTS[2]) + len(first) - 1
    other = [*longer[:4], 99, 98]
    assert engine.write(other, config) == PlainEngine(model).write(other, config)
    assert engine.num_reused == 4


def test_an_interrupt_leaves_the_cache_right(library):
    model = make_model()
    engine = EngineMaker(model, "fast", lambda: library).engine()
    config, seen = GenerationConfig(**GREEDY), []

    def stop(one):
        seen.append(one)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.write(PROMPTS[0], config, stop)
    again = [*PROMPTS[0], *seen, 33]
    assert engine.write(again, config) == PlainEngine(model).write(again, config)


@pytest.mark.parametrize("kind", ["fast", "generate"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("shared", [[], [44, 9, 71, 5, 5]])
def test_many_at_once_are_as_one_by_one(kind, penalty, shared, monkeypatch):
    monkeypatch.setattr("tinyllm.decode.side_by_side.MAX_ROWS", 3)  # rows are used again
    monkeypatch.setattr("tinyllm.decode.plain.ROWS", 3)
    model = make_lora()
    config = GenerationConfig(
        **GREEDY | {"eos_token_id": list(range(1, 60))}, repetition_penalty=penalty
    )
    engine = EngineMaker(model, kind).engine("default")
    prompts = [[*shared, *p, i] for i, p in enumerate(PROMPTS * 3)]
    found: dict = {}
    engine.write_many(prompts, config, found.__setitem__)
    plain = EngineMaker(model, "generate").engine("default")
    assert found == {i: plain.write(p, config) for i, p in enumerate(prompts)}
    assert len({len(ids) for ids in found.values()}) > 2


def test_what_all_prompts_begin_with():
    assert num_shared([[1, 2, 3], [1, 2, 9, 4], [1, 2, 3, 5]]) == 2
    assert num_shared([[1, 2], [1, 2]]) == 1 and num_shared([[4]]) == 0
    assert num_shared([[1, 2, 3], [1, 2]]) == 1 and num_shared([[5, 1], [6, 1]]) == 0


def test_many_at_once_sample_by_their_own_seeds():
    engine = EngineMaker(make_model(), "fast").engine()
    config = GenerationConfig(**SAMPLED)
    together: dict = {}
    engine.write_many(PROMPTS, config, together.__setitem__, [1, 2, 3, 4])
    alone: dict = {}
    engine.write_many([PROMPTS[2]], config, alone.__setitem__, [3])
    assert alone[0] == together[2]


def test_sampled_rows_have_the_model_s_distribution():
    model, prompt = make_model(), PROMPTS[0]
    config = GenerationConfig(**SAMPLED | {"max_new_tokens": 1}, temperature=0.7, top_k=4)
    counts = torch.zeros(480)
    engine = EngineMaker(model, "fast").engine()
    engine.write_many(
        [prompt] * 2000, config, lambda i, ids: counts[ids[0]].add_(1), list(range(2000))
    )
    logits = model(torch.tensor([prompt])).logits[0, -1] / 0.7
    kept = logits.topk(4)
    expected = torch.zeros(480).scatter(0, kept.indices, kept.values.softmax(-1)) * 2000
    assert ((counts - expected).abs() <= 5 * expected.sqrt() + 1e-6).all()


def test_models_it_does_not_know_are_left_to_generate():
    half = make_model().bfloat16()
    assert "float32" in unsupported(half)
    engine = EngineMaker(half, "auto").engine()
    assert engine.name == "generate" and "float32" in engine.why
    with pytest.raises(UserError, match="float32"):
        EngineMaker(half, "fast").engine()
    saved = get_peft_model(
        make_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    assert unsupported(saved)
    dora = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    assert unsupported(dora)


def test_a_model_that_computes_otherwise_is_noticed():
    model = make_model()
    model.model.norm.register_forward_hook(lambda module, args, out: out * 1.5)
    engine = EngineMaker(model, "auto").engine()
    assert engine.name == "generate" and "logits are off" in engine.why


def test_options_of_generate_alone_are_named():
    assert unsupported_options(GenerationConfig(**SAMPLED, top_k=5)) == []
    assert unsupported_options(GenerationConfig(num_beams=2)) == ["num_beams"]
    assert unsupported_options(GenerationConfig(no_repeat_ngram_size=3)) == ["no_repeat_ngram_size"]


def test_without_a_compiler_there_is_no_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    assert kernel.load() is None and not list(tmp_path.rglob("*.so"))
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert kernel.load() is None
