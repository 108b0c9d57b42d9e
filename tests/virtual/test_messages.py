"""Messages: what they cost, in which order they match, what a buffer may hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mpilm.errors import WorldError
from mpilm.world.base import ANY_SOURCE, ANY_TAG
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, run_virtual

# Figures that add up exactly: 1 s of latency, 8 bytes per second.
SLOW = Machine(latency_s=1.0, bandwidth_Bps=8.0, step_s=0.0)
NODES = Machine(
    latency_s=1.0,
    bandwidth_Bps=8.0,
    ranks_per_node=2,
    node_latency_s=0.25,
    node_bandwidth_Bps=32.0,
    step_s=0.0,
)


def doubles(count, value=0.0):
    return np.full(count, float(value))


def test_a_message_costs_latency_plus_bytes_over_bandwidth():
    def main(world):
        if world.rank == 0:
            world.comm.Send(doubles(4), 1)
        elif world.rank == 1:
            world.comm.Recv(doubles(4), 0)
        return world.now_s()

    assert run_virtual(main, 2, machine=SLOW)[:2] == [4.0, 5.0]


def test_inside_a_node_the_link_of_the_node_is_taken():
    def main(world):
        peer = world.rank ^ 1 if world.rank < 2 else None
        if world.rank in (0, 1):
            world.comm.Sendrecv(doubles(4), peer, recvbuf=doubles(4), source=peer)
        elif world.rank == 2:
            world.comm.Send(doubles(4), 4)
        elif world.rank == 4:
            world.comm.Recv(doubles(4), 2)
        return world.now_s()

    times = run_virtual(main, 5, machine=NODES)
    assert times[0] == times[1] == 0.25 + 32 / 32
    assert times[4] == 1.0 + 32 / 8


def test_messages_of_one_sender_queue_at_its_port():
    def main(world):
        if world.rank == 0:
            sends = [world.comm.Isend(doubles(1), dest) for dest in (1, 2, 3)]
            times = []
            for send in sends:
                send.Wait()
                times.append(world.now_s())
            return times
        world.comm.Recv(doubles(1), 0)
        return world.now_s()

    assert run_virtual(main, 4, machine=SLOW) == [[1.0, 2.0, 3.0], 2.0, 3.0, 4.0]


def test_messages_to_one_receiver_queue_at_its_port():
    def main(world):
        if world.rank > 0:
            world.sleep(world.rank / 8)
            world.comm.Send(doubles(1, world.rank), 0)
            return None
        received = []
        for _ in range(3):
            number = doubles(1)
            world.comm.Recv(number)
            received.append((number[0], world.now_s()))
        return received

    expected = [(1.0, 2.125), (2.0, 3.125), (3.0, 4.125)]
    assert run_virtual(main, 4, machine=SLOW)[0] == expected


def test_a_port_that_has_rested_passes_a_burst_at_once():
    """Of 8 s two are saved at either end, of the message that follows none."""

    def main(world):
        if world.rank == 0:
            world.sleep(10.0)
            sends = [world.comm.Isend(doubles(8), 1) for _ in range(2)]
            for send in sends:
                send.Wait()
            return None
        times = []
        for _ in range(2):
            world.comm.Recv(doubles(8), 0)
            times.append(world.now_s() - 10.0)
        return times

    machine = replace(SLOW, burst_bytes=16)
    assert run_virtual(main, 2, machine=machine)[1] == [7.0, 15.0]


def test_both_ports_work_at_once():
    def main(world):
        peer = 1 - world.rank
        world.comm.Sendrecv(doubles(8), peer, recvbuf=doubles(8), source=peer)
        return world.now_s()

    assert run_virtual(main, 2, machine=SLOW) == [9.0, 9.0]


@pytest.mark.parametrize("jitter", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_messages_of_one_sender_do_not_overtake(jitter, seed):
    machine = Machine(latency_s=1.0, bandwidth_Bps=1e6, jitter=jitter)

    def main(world):
        if world.rank == 1:
            for number in range(30):
                world.comm.Isend(doubles(1 + number % 3, number), 0, tag=number % 2)
                world.sleep(0.01)
            return None
        even = [doubles(3) for _ in range(15)]
        for buf in even:
            world.comm.Recv(buf, 1, tag=0)
        rest = [doubles(3) for _ in range(15)]
        for buf in rest:
            world.comm.Recv(buf, 1, tag=ANY_TAG)
        return [buf[0] for buf in even], [buf[0] for buf in rest]

    even, odd = run_virtual(main, 2, machine=machine, seed=seed)[0]
    assert even == list(range(0, 30, 2))
    assert odd == list(range(1, 30, 2))


def test_receives_that_were_posted_match_in_the_order_of_posting():
    def main(world):
        if world.rank == 0:
            for number in range(4):
                world.comm.Send(doubles(1, number), 1, tag=number)
            return None
        bufs = [doubles(1, -1.0) for _ in range(4)]
        tags = [ANY_TAG, 2, 1, ANY_TAG]
        requests = [world.comm.Irecv(b, 0, t) for b, t in zip(bufs, tags, strict=True)]
        for request in requests:
            request.Wait()
        return [buf[0] for buf in bufs]

    assert run_virtual(main, 2)[1] == [0.0, 2.0, 1.0, 3.0]


def test_wildcards_take_what_came_first():
    def main(world):
        if world.rank > 0:
            world.sleep(10.0 - world.rank)
            world.comm.Send(doubles(1, world.rank), 0, tag=world.rank)
            return None
        received = []
        for _ in range(4):
            buf = doubles(1)
            world.comm.Recv(buf, ANY_SOURCE, ANY_TAG)
            received.append(buf[0])
        return received

    assert run_virtual(main, 5)[0] == [4.0, 3.0, 2.0, 1.0]


def test_improbe_returns_messages_in_the_order_of_delivery():
    def main(world):
        comm = world.comm
        if world.rank > 0:
            world.sleep(1.0 / world.rank)
            comm.Send(doubles(world.rank, world.rank), 0, tag=5)
            return None
        assert comm.Improbe() is None
        world.sleep(50.0)
        found = []
        assert comm.Improbe(tag=6) is None
        special = comm.Improbe(source=1)
        while (message := comm.Improbe(tag=5)) is not None:
            buf = doubles(9, -1.0)
            message.Recv(buf)
            found.append((message.source, message.tag, message.nbytes, buf.tolist()))
        special.Recv(doubles(1))
        return found

    assert run_virtual(main, 4, machine=SLOW)[0] == [
        (3, 5, 24, [3.0] * 3 + [-1.0] * 6),
        (2, 5, 16, [2.0] * 2 + [-1.0] * 7),
    ]


@pytest.mark.parametrize("asks", ["Improbe", "Test"])
def test_who_asks_for_ever_while_time_stands_still_is_told_so(asks):
    def main(world):
        request = world.comm.Irecv(np.zeros(1), 0, tag=1)
        while True:
            if world.comm.Improbe() if asks == "Improbe" else request.Test():
                return

    with pytest.raises(WorldError, match="asks again and again without letting time"):
        run_virtual(main, 1)


def test_wait_with_improbe_is_woken_by_the_message():
    def main(world):
        if world.rank == 0:
            world.sleep(7.0)
            world.comm.Send(doubles(1, 4.0), 1)
            return None
        message = world.wait(world.comm.Improbe, "a message")
        buf = doubles(1)
        message.Recv(buf)
        return world.now_s(), buf[0]

    assert run_virtual(main, 2, machine=SLOW)[1] == (9.0, 4.0)


def test_a_send_buffer_is_read_at_the_call_and_a_receive_buffer_filled_at_the_end():
    def main(world):
        peer = 1 - world.rank
        mine, other = doubles(2, 1.0 + world.rank), doubles(2, -1.0)
        receive = world.comm.Irecv(other, peer)
        send = world.comm.Isend(mine, peer)
        mine[:] = 99.0
        world.sleep(2.5)
        early = other.copy()
        receive.Wait()
        send.Wait()
        return early.tolist(), other.tolist()

    assert run_virtual(main, 2, machine=SLOW) == [
        ([-1.0, -1.0], [2.0, 2.0]),
        ([-1.0, -1.0], [1.0, 1.0]),
    ]


def test_a_long_send_waits_for_its_receive():
    machine = Machine(latency_s=1.0, bandwidth_Bps=8.0, eager_bytes=8)

    def main(world):
        if world.rank == 0:
            world.comm.Send(doubles(1), 1, tag=1)
            short_s = world.now_s()
            world.comm.Send(doubles(2), 1, tag=2)
            return short_s, world.now_s()
        world.sleep(20.0)
        world.comm.Recv(doubles(1), tag=1)
        world.sleep(10.0)
        world.comm.Recv(doubles(2), tag=2)
        return world.now_s()

    assert run_virtual(main, 2, machine=machine) == [(1.0, 30.0), 30.0]


def test_two_long_sends_face_to_face_are_a_deadlock():
    def main(world):
        peer = 1 - world.rank
        world.comm.Send(doubles(10_000), peer, tag=4)
        world.comm.Recv(doubles(10_000), peer, tag=4)

    with pytest.raises(WorldError) as caught:
        run_virtual(main, 2)
    assert (
        "rank 1: the learner waits for rank 0 to receive a message"
        " (tag 4, 80000 bytes)" in str(caught.value)
    )


def test_messages_that_nobody_received_are_told():
    def main(world):
        comm = world.comm.Split(0, key=-world.rank)
        if world.rank == 0:
            comm.Isend(doubles(3), 0, tag=6)  # rank 2 of the world
        world.comm.Isend(np.zeros(5, np.uint8), 1, tag=world.rank)
        if world.rank == 1:
            world.comm.Recv(np.zeros(5, np.uint8), 0)

    simulation = Simulation(3)
    simulation.run(main)
    assert sorted(simulation.undelivered) == [(0, 2, 6, 24), (1, 1, 1, 5), (2, 1, 2, 5)]


def test_a_rank_can_write_to_itself():
    def main(world):
        buf = doubles(2)
        request = world.comm.Irecv(buf, world.rank)
        world.comm.Send(doubles(2, 3.0), world.rank)
        request.Wait()
        return buf.tolist()

    assert run_virtual(main, 2) == [[3.0, 3.0]] * 2


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "uint8"])
@pytest.mark.parametrize("send", [np, torch])
@pytest.mark.parametrize("receive", [np, torch])
def test_arrays_of_both_libraries_travel(dtype, send, receive):
    def main(world):
        if world.rank == 0:
            world.comm.Send(send.arange(5, dtype=getattr(send, dtype)), 1)
            return None
        buf = receive.full((7,), 9, dtype=getattr(receive, dtype))  # two guards
        world.comm.Recv(buf, 0)
        return [int(x) for x in buf]

    assert run_virtual(main, 2)[1] == [0, 1, 2, 3, 4, 9, 9]


def test_a_tensor_that_needs_a_gradient_is_received_into():
    def main(world):
        buf = torch.nn.Parameter(torch.zeros(2))
        if world.rank == 0:
            world.comm.Send(torch.ones(2, requires_grad=True), 1)
        else:
            world.comm.Recv(buf, 0)
        return buf.tolist()

    assert run_virtual(main, 2)[1] == [1.0, 1.0]


@pytest.mark.parametrize("posted_first", [True, False])
@pytest.mark.parametrize(
    ("buf", "problem"),
    [
        (np.zeros(1), "a message of 16 bytes of float64 from rank 0 (tag 3)"),
        (np.zeros(4, np.float32), "does not fit into 16 bytes of float32"),
    ],
)
def test_a_message_that_does_not_fit_names_the_receiver(posted_first, buf, problem):
    def main(world):
        if (world.rank == 0) is posted_first:
            world.sleep(5.0)
        if world.rank == 0:
            world.comm.Send(doubles(2), 1, tag=3)
        else:
            world.comm.Recv(buf)

    with pytest.raises(WorldError, match=r"^rank 1: ") as caught:
        run_virtual(main, 2)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("buf", "problem"),
    [
        (np.zeros((2, 2)), "not 1-D contiguous"),
        (np.zeros(4)[::2], "not 1-D contiguous"),
        (torch.zeros(4)[::2], "not 1-D contiguous"),
        (np.zeros(2, np.float16), "a buffer of float16"),
        (np.zeros(2, ">f4"), "a buffer of >f4"),
        (torch.zeros(2, dtype=torch.bfloat16), "a buffer of torch.bfloat16"),
        ([1.0], "must be an array, not list"),
    ],
)
def test_buffers_that_cannot_travel_are_refused(buf, problem):
    with pytest.raises(WorldError, match=r"^rank 0: ") as caught:
        run_virtual(lambda world: world.comm.Isend(buf, 0), 1)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda comm: comm.Isend(np.zeros(1), 2),
        lambda comm: comm.Isend(np.zeros(1), -1),
        lambda comm: comm.Irecv(np.zeros(1), 2),
        lambda comm: comm.Improbe(source=7),
        lambda comm: comm.Bcast(np.zeros(1), root=2),
    ],
)
def test_ranks_that_do_not_exist_are_refused(call):
    with pytest.raises(WorldError, match="is not one of 2 ranks"):
        run_virtual(lambda world: call(world.comm), 2)


def test_what_is_counted_of_messages():
    def main(world):
        if world.rank == 0:
            world.comm.Send(doubles(4), 1)
            world.start(lambda: world.comm.Send(doubles(4), 1), "other").join()
        else:
            buf = doubles(4)
            receive = world.comm.Irecv(buf)
            world.sleep(3.0)
            receive.Wait()
            world.start(lambda: world.comm.Recv(buf), "other").join()
        return world.traffic

    first, second = run_virtual(main, 2, machine=SLOW)
    assert (first.bytes_sent, first.bytes_received) == (64, 0)
    assert (second.bytes_sent, second.bytes_received) == (0, 64)
    assert first.messages == second.messages == 2
    # the learner's own: Send 0-4 s; Irecv 0-5 s, of which 3-5 s blocked; join until 9 s
    assert first.in_flight_s == 4.0
    assert second.in_flight_s == 5.0
    assert second.blocked_s == 2.0 + 4.0


def test_a_message_that_was_found_is_counted_once_when_it_is_received():
    def main(world):
        if world.rank == 0:
            world.comm.Send(doubles(4), 1)
            return None
        message = world.wait(world.comm.Improbe, "a message")
        before = world.traffic.messages, world.traffic.bytes_received
        message.Recv(doubles(4))
        return before, (world.traffic.messages, world.traffic.bytes_received)

    assert run_virtual(main, 2)[1] == ((0, 0), (1, 32))
