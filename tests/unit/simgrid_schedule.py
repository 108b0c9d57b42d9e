"""What SimGrid makes of a schedule of messages; run by the system's Python.

    python3 simgrid_schedule.py <schedule.json

The schedule: latency_s, bandwidth_Bps and, for each rank, phases: "to", [dest, bytes]
of messages to send, and "from", [source, bytes] of those to receive. A rank begins a
phase when all of the last one has gone and come. Printed: when each rank is done.

The platform is the virtual world's: an up-link and a down-link a rank, no other limit;
or, with ranks_per_node, of those between nodes also an up-link and a down-link a node,
of node_Bps.
"""

import json
import sys

from simgrid import Actor, Engine, LinkInRoute, Mailbox, NetZone


def main() -> None:
    """Read a schedule, play it, print the ends."""
    schedule = json.load(sys.stdin)
    ranks = schedule["ranks"]
    # no TCP: bytes over bandwidth and the latency, as machine.py (1)
    engine = Engine(
        [
            "schedule",
            "--cfg=network/model:CM02",
            "--cfg=network/TCP-gamma:0",
            "--cfg=network/crosstraffic:0",
            "--log=root.threshold:error",
        ]
    )
    zone = NetZone.create_full_zone("all")
    hosts = []
    ports = []
    for rank in range(len(ranks)):
        host = zone.create_host(f"h{rank}", 1e9)
        up = zone.create_link(f"up{rank}", schedule["bandwidth_Bps"])
        up.set_latency(schedule["latency_s"])
        down = zone.create_link(f"down{rank}", schedule["bandwidth_Bps"])
        hosts.append(host)
        ports.append((up.seal(), down.seal()))
    in_node = schedule.get("ranks_per_node", 1)
    nodes = []
    for node in range(-(-len(ranks) // in_node) if in_node > 1 else 0):
        links = [
            zone.create_link(f"{way}node{node}", schedule["node_Bps"]).seal()
            for way in ("up", "down")
        ]
        nodes.append(links)
    for a, host in enumerate(hosts):
        for b, other in enumerate(hosts):
            if a != b:
                links = [ports[a][0], ports[b][1]]
                if nodes and a // in_node != b // in_node:
                    links[1:1] = [nodes[a // in_node][0], nodes[b // in_node][1]]
                route = [LinkInRoute(link) for link in links]
                zone.add_route(host.netpoint, other.netpoint, None, None, route, False)
    zone.seal()
    ends = [0.0] * len(ranks)

    def play(rank: int) -> None:
        for number, phase in enumerate(ranks[rank]):
            pending = [
                Mailbox.by_name(f"{rank} {dest} {number}").put_async(
                    b"", int(num_bytes)
                )
                for dest, num_bytes in phase["to"]
            ]
            received = [
                Mailbox.by_name(f"{source} {rank} {number}").get_async()
                for source, _ in phase["from"]
            ]
            for comm in [*pending, *(comm for comm, _ in received)]:
                comm.wait()
        ends[rank] = Engine.clock

    for rank, host in enumerate(hosts):
        Actor.create(f"rank{rank}", host, play, rank)
    engine.run()
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
