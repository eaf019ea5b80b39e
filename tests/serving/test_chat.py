"""Requests in the forms that clients of other servers send."""

import json

import pytest

from r1s_jax.serving.chat import Refused, read_request

ASK = [{"role": "user", "content": "Who?"}]
NEUTRAL = {
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1.0,
    "length_penalty": 1,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "chat_template_kwargs": {},
    "best_of": 1,
    "use_beam_search": False,
    "min_tokens": 0,
    "stop_token_ids": [],
    "thinking": {"type": "disabled"},
    "logit_bias": {},
    "frequency_penalty": 0.0,
    "top_logprobs": 0.0,
    "user": "me",
}
ASKS_FOR_MORE = {
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "chat_template_kwargs": {"enable_thinking": False},
    "best_of": 2,
    "thinking": {"type": "enabled"},
    "min_tokens": 3,
}


def read(**body):
    return read_request(json.dumps({"messages": ASK, **body}).encode())


@pytest.mark.parametrize("name", NEUTRAL)
def test_values_without_effect_are_accepted(name):
    assert read(**{name: NEUTRAL[name]}).conversation()
    assert read(**{name: None}).conversation()


@pytest.mark.parametrize("name", ASKS_FOR_MORE)
def test_values_for_unsupported_features_are_refused(name):
    with pytest.raises(Refused, match=f"{name} is not supported"):
        read(**{name: ASKS_FOR_MORE[name]})


def test_whole_numbers_may_be_written_as_floats():
    request = read(max_tokens=5.0, seed=7.0, n=2.0)
    assert (request.limit, request.seed, request.samples) == (5, 7, 2)
    assert type(request.seed) is int
    assert read(max_completion_tokens=5.0).limit == 5
    for name in ("max_tokens", "seed", "n"):
        for value in (5.5, 1e300, float("nan"), float("inf"), "5"):
            with pytest.raises(Refused, match=name):
                read(**{name: value})


@pytest.mark.parametrize(
    "content", ["", " \n", [], [{"type": "text", "text": ""}], [{"type": "text", "text": " "}] * 2]
)
def test_an_empty_question_is_refused(content):
    request = read(messages=[*ASK, {"role": "user", "content": content}])
    with pytest.raises(Refused, match=r"messages\[1\].content: expected a question") as refused:
        request.conversation()
    assert refused.value.status == 400
    earlier = read(messages=[{"role": "user", "content": content}, *ASK])
    assert earlier.conversation()[-1]["content"] == "Who?"
