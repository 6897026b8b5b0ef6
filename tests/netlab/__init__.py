"""A small Internet in network namespaces: public hosts, homes behind NATs, and lines with a delay.

    with Lab() as lab:
        lab.public("p1")                                      # 198.19.1.11, 2001:db8:1::11
        lab.home("a", "cone", hosts=2, line=Line(40, 100))    # a1, a2 in 192.168.1.0/24, behind the router a
        lab.home("b", "symmetric")                            # b1, with the private address of a1
        lab.forward("a", 31330, "a1")
        process = lab.popen("a1", [sys.executable, "-m", "node", ...], text=True)

`topology` says which steps make it, and is pure; `lab` takes them; `namespaces` holds the namespaces; `line`
carries frames.  Benchmarks use it too.
"""
