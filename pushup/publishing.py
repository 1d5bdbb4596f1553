"""Publications over HTTP, the same for both sides of a node: what a request's body orders, and what is said of it."""

from collections.abc import Sequence
from typing import Final

import msgspec

from pushup.access import Grant
from pushup.errors import InvalidRequest, PushUpError
from pushup.messages import Publication, Receipt
from pushup.realm import Realm
from pushup.wire import is_batch, parse_publication, parse_publications, show_receipt

_receipts: Final = msgspec.json.Encoder(enc_hook=show_receipt)


class Order(msgspec.Struct, frozen=True):
    """What is to be published, and of an array every item, in order, with those that were wrong."""

    publications: Sequence[Publication]
    items: Sequence[Publication | PushUpError] | None

    @property
    def status(self) -> int:
        return 201 if self.items is None else 200

    def show(self, results: Sequence[Receipt | PushUpError]) -> bytes:
        """The answer as JSON text, from a result for each of the publications. Raises the error of a single one."""
        if self.items is None:
            (result,) = results
            if isinstance(result, PushUpError):
                raise result
            if not result.duplicate:
                return b'{"id":%d}' % result.id  # What follows would say the same, and takes longer.
            return _receipts.encode(result)
        if len(results) == len(self.items):
            return _receipts.encode(results)
        rest = iter(results)
        return _receipts.encode([item if isinstance(item, PushUpError) else next(rest) for item in self.items])


def read_order(realm: Realm, grant: Grant, body: bytes, keys: Sequence[str]) -> Order:
    """What the body orders. `keys` are the values of Idempotency-Key. Raises PushUpError; O(n)."""
    if len(keys) > 1:
        raise InvalidRequest("the Idempotency-Key header is given more than once")
    if not is_batch(body):
        realm.charge(grant, 1)  # Also for what is refused: it costs time, too.
        publication = parse_publication(body, realm.settings, keys[0] if keys else None)
        grant.check("publish", publication.channels)
        return Order([grant.mark(publication)], None)
    if keys:
        raise InvalidRequest("an array of publications has a key in each item, not an Idempotency-Key header")
    items = parse_publications(body, realm.settings)
    if grant.token or not grant.allows_all("publish"):
        items = [_checked(grant, item) for item in items]
    realm.charge(grant, len(items))
    return Order([item for item in items if type(item) is Publication], items)


def _checked(grant: Grant, item: Publication | PushUpError) -> Publication | PushUpError:
    if isinstance(item, PushUpError):
        return item
    try:
        grant.check("publish", item.channels)
    except PushUpError as error:
        return error
    return grant.mark(item)
