"""What must hold for any input: hypothesis makes them up (the same ones each time)."""

import string
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import evaluate
import train
from model import BadInput

settings.register_profile("here", derandomize=True, database=None, deadline=None, max_examples=80)
settings.load_profile("here")

WORDS = ["####", *map(str, range(10)),
         *(f"{a}{b}" for a in train.LETTERS for b in ("+2", "*4", "=7", "=0", "-3"))]
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-2 ** 60, 2 ** 60) | st.text() |
    st.floats(allow_nan=False), lambda inner: st.lists(inner, max_size=3) |
    st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)


@pytest.fixture(scope="module")
def tokenizer(toy_model):
    return data.Tokenizer(toy_model)


@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=6))
def test_what_is_supervised_is_the_response(tokenizer, pairs):
    """Guards a mask that is off by one at either end of any trace of any batch, and a shift in the
    wrong direction: position t reads the token before the one that it predicts."""
    examples = [data.encode_trace({"prompt": a, "response": b}, tokenizer, f"x line {i}")
                for i, (a, b) in enumerate(pairs)]
    batch = data.collate(examples)
    T, flat = batch.tokens.shape[1], batch.tokens.flatten()
    assert [tokenizer.decode(part.tolist()) for part in
            batch.labels.split([len(b.split()) + 1 for _, b in pairs])] == [b for _, b in pairs]
    read = iter(zip(batch.positions.tolist(), batch.labels.tolist(), strict=True))
    for i, example in enumerate(examples):
        ids = example.tokens.tolist()
        for t in range(example.prompt_length, len(ids)):
            position, label = next(read)
            assert position == i * T + t - 1 and flat[position] == ids[t - 1] and label == ids[t]
        assert ids[-1] == tokenizer.eot_id
    assert next(read, None) is None
    for row, example in zip(batch.tokens.tolist(), examples, strict=True):  # then only padding
        assert row == [*example.tokens[:-1].tolist(), *[0] * (T + 1 - len(example.tokens))]


@given(st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=5))
def test_jsonl_round_trip(tmp_path_factory, records):
    """Guards characters that end a line for some readers (U+2028, NEL), and numbers that change."""
    file = tmp_path_factory.getbasetemp() / "round.jsonl"
    data.write_jsonl(file, records)
    assert [record for _, record in data.read_jsonl(file)] == records


@given(st.binary(max_size=60) | st.text('{}[]":,\\u0d8 \n1en-+', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    """Guards a traceback for a file that is no JSONL at all."""
    file = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    file.write_bytes(content)
    try:
        assert all(isinstance(record, dict) for _, record in data.read_jsonl(file))
    except BadInput as error:
        assert str(error).startswith(f"{file} ")


@given(st.integers(-10 ** 6, 10 ** 6), st.integers(-10 ** 6, 10 ** 6), st.integers(1, 400))
def test_numbers_are_equal_or_not(a, b, k):
    """Guards verdicts on plain numbers, separators, fractions and products, for any of them."""
    for x in (a, b, b % 7):
        assert evaluate.is_correct(f"so \\boxed{{{a}}}", str(x)) == (a == x)
        assert evaluate.is_correct(f"#### {a:,}", f"{x}") == (a == x)
    assert evaluate.is_correct(f"\\boxed{{\\frac{{{a}}}{{{k}}}}}", f"{b}/{k}") == (a == b)
    fraction = Fraction(a, k)
    assert evaluate.is_correct(f"\\boxed{{{a}/{k}}}",
                               f"\\frac{{{fraction.numerator}}}{{{fraction.denominator}}}")
    assert evaluate.is_correct(f"${a % 99}x + {k}$", f"{k}+{a % 99}x")
    assert not evaluate.is_correct(f"${a % 99}x + {k}$", f"{k + 1}+{a % 99}x")


@given(st.text(alphabet=string.printable + "²√≤π\\", max_size=60),
       st.text(alphabet="0123456789\\{}()[]^_$,./-+*=<>|! abxfracsqrtpi", max_size=40))
def test_grading_never_fails(prediction, gold):
    """Guards an exception or an unboxed verdict for any text; and answers that equal themselves."""
    assert evaluate.is_correct(prediction, gold) in (True, False)
    answer = evaluate.extract_answer(prediction)
    assert isinstance(answer, str)
    if gold.strip().isalnum():
        assert evaluate.is_correct(f"\\boxed{{{gold}}}", gold)
