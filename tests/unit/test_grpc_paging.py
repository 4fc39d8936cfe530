"""Page tokens and sizes."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.paging import decode_token, encode_token, page_size_of

_JSON = st.lists(st.text() | st.integers() | st.booleans(), max_size=4)


@given(st.text(), _JSON)
def test_a_token_gives_back_its_position(scope: str, position: list[object]) -> None:
    token = encode_token(scope, position)
    assert token.isascii()
    assert "=" not in token
    assert decode_token(scope, token, "page_token") == position


@given(st.text(), st.text(), _JSON)
def test_a_token_is_for_its_scope(scope: str, other: str, position: list[object]) -> None:
    if scope != other:
        with pytest.raises(ServiceError) as caught:
            decode_token(other, encode_token(scope, position), "page_token")
        assert caught.value.reason is Reason.PAGE_TOKEN_INVALID


@given(_JSON, st.data())
def test_a_token_has_one_spelling(position: list[object], data: st.DataObject) -> None:
    token = encode_token("scope", position)
    altered = data.draw(st.sampled_from([token + "=", token + "==", token[:-1]]) | _last_character_of(token))
    if altered != token:
        with pytest.raises(ServiceError) as caught:
            decode_token("scope", altered, "page_token")
        assert caught.value.reason is Reason.PAGE_TOKEN_INVALID


def _last_character_of(token: str) -> st.SearchStrategy[str]:
    """The token with its last character altered, which may hold bits that decoding drops."""
    return st.sampled_from(string.ascii_letters + string.digits + "-_").map(lambda last: token[:-1] + last)


@given(st.text() | st.text("ABCDabcd0123-_="))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    with pytest.raises(ServiceError) as caught:
        decode_token("scope", text, "page_token")
    assert caught.value.reason is Reason.PAGE_TOKEN_INVALID
    assert caught.value.violations[0].field == "page_token"


@pytest.mark.parametrize(("requested", "meant"), [(0, 50), (1, 1), (999, 999), (1000, 1000), (2**31 - 1, 1000)])
def test_page_sizes(requested: int, meant: int) -> None:
    assert page_size_of(requested) == meant


def test_a_negative_page_size_is_refused() -> None:
    with pytest.raises(ServiceError):
        page_size_of(-1)
