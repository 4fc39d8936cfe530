"""Which cache server holds which shard: what the settings may say, and what they mean."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from segsvc.cache.server import server_name
from segsvc.config import Settings
from segsvc.domain.cache_layout import split_urls, urls_by_shard

A, B, C = (f"redis://:secret@{name}:6379/0" for name in "abc")
DSN = "postgresql+psycopg2://localhost/x"


def settings(shards: int = 4, **given: Any) -> Settings:
    return Settings(_env_file=None, shard_dsns=(DSN,) * shards, **given)  # type: ignore[call-arg]


@pytest.mark.parametrize("text", [f"{A} {B}", f"{A},{B}", f"{A}, {B}", f" {A} ,{B}\n", f"{A}\n{B}"])
def test_urls_are_separated_by_spaces_or_commas(text: str) -> None:
    assert split_urls(text) == (A, B)


def test_a_comma_in_a_password_separates_nothing() -> None:
    url = "redis://:one,two@a:6379/0"
    assert split_urls(f"0-1={url},2-3={url}") == (f"0-1={url}", f"2-3={url}")


def test_urls_alone_are_used_in_turn() -> None:
    assert urls_by_shard((A, B), 5) == (A, B, A, B, A)
    assert urls_by_shard((A,), 2) == (A, A)


def test_urls_with_shards_hold_exactly_these() -> None:
    assert urls_by_shard((f"0-2={A}", f"3={B}", f"4={A}"), 5) == (A, A, A, B, A)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((A, B, C, C.replace("c:", "d:"), C.replace("c:", "e:")), "5 URLs for 4 shards: a server would hold nothing"),
        ((A, B, A), "a URL is there twice"),
        ((f"0-3={A}", B), "URL 2 names no shards"),
        ((f"0-1={A}", f"1-3={B}"), "shard 1 has two URLs"),
        ((f"0-1={A}", f"3={B}"), "no URL names shard 2"),
        ((f"0-4={A}",), "there is no shard 4: the shards are 0 to 3"),
        ((f"3-0={A}",), "3-0 is no range of shards"),
    ],
)
def test_what_does_not_fit_the_shards_is_refused(parts: tuple[str, ...], said: str) -> None:
    for name in ("cache_urls", "cache_urls_also"):
        with pytest.raises(ValidationError, match=f"SEGSVC_{name.upper()}: {said}") as refused:
            settings(**{name: parts})
        assert "secret" not in str(refused.value.errors()[0]["msg"])


@pytest.mark.parametrize("text", ["amqp://a", f"{A} b:6379", "redis://a:6379,b:6379", "redis://a,b/0", f"1.5={A}"])
def test_what_is_no_url_of_redis_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        settings(cache_urls=text)


def test_one_server_holds_every_shard_unless_several_are_named() -> None:
    assert settings(cache_url=A).cache_url_by_shard == (A,) * 4
    several = settings(cache_url=A, cache_urls=f"{B} {C}")
    assert several.cache_url_by_shard == (B, C, B, C)
    assert several.cache_url_also_by_shard == ()
    assert several.all_cache_urls == (B, C)


def test_the_other_layout_of_a_change_may_be_one_server() -> None:
    changing = settings(cache_urls=f"0-1={A} 2-3={B}", cache_urls_also=A)
    assert changing.cache_url_also_by_shard == (A,) * 4
    assert changing.all_cache_urls == (A, B)


def test_passwords_are_hidden() -> None:
    shown = str(settings(cache_urls=f"0-1={A} 2-3={B}", cache_urls_also=f"{C}").masked())
    assert "secret" not in shown


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (A, "a:6379"), ("rediss://user:secret@h:7000", "h:7000"), ("redis://h", "h:6379"), ("redis://h/3", "h:6379/3"),
        ("redis://[::1]:7000/0", "[::1]:7000"), ("unix://:secret@/run/cache.sock?db=0", "/run/cache.sock"),
    ],
)  # fmt: skip
def test_a_servers_name_holds_no_secret(url: str, name: str) -> None:
    assert server_name(url) == name
