"""A whole server, over real sockets."""

from tests.support import connected, parked, running


async def test_a_parked_poll_is_answered_by_a_publication() -> None:
    """The first sentence of the README, run."""
    async with running() as server, connected(server) as poller, connected(server) as publisher:
        poller.send("GET /poll?channel=news HTTP/1.1\r\nHost: test\r\n\r\n")
        await parked(server, 1)
        id = await publisher.publish("news", data={"hello": "world"})
        answer = await poller.reply()

        assert answer.status == 200
        assert answer.json == {
            "messages": [{"id": id, "channels": ["news"], "data": {"hello": "world"}}],
            "next": id + 1,
            "gap": False,
        }
