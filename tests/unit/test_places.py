"""Places for long calls: limits for all callers and for each caller, and the return of a place."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from grpc_api.places import Places
from segsvc.domain.errors import Reason, ServiceError


def refusal(places: Places, peer: str) -> ServiceError:
    with pytest.raises(ServiceError) as caught, places.taken(peer):
        pass
    return caught.value


def test_a_caller_has_fewer_places_than_all_have() -> None:
    places = Places("exports", total=3, per_caller=2)
    with ExitStack() as taken:
        taken.enter_context(places.taken("ipv4:10.0.0.1:1000"))
        taken.enter_context(places.taken("ipv4:10.0.0.1:1001"))
        refused = refusal(places, "ipv4:10.0.0.1:1002")
        assert (refused.reason, refused.retry_after_s) == (Reason.OVERLOADED, 2.0)
        assert "from one address" in refused.message
        taken.enter_context(places.taken("ipv6:[::1]:1000"))
        assert "from one address" not in refusal(places, "ipv4:10.0.0.2:1000").message

    with places.taken("ipv4:10.0.0.1:1002"):
        pass


def test_a_place_is_given_back_when_its_call_fails() -> None:
    places = Places("exports", total=1)
    with pytest.raises(KeyError), places.taken("ipv4:10.0.0.1:1000"):
        raise KeyError
    with places.taken("ipv4:10.0.0.1:1000"):
        pass
