//! Path MTU discovery over a path that carries less than both nodes' MTU.

use super::*;

/// Returns how many packets of `size` bytes arrive in the time `by`.
fn arrives(lab: &mut Lab, size: usize, by: Duration) -> usize {
    let before = lab.nodes[1].received.len();
    let end = lab.now.mono + by;
    while lab.now.mono < end {
        let length = lab.view(0, 1).path_mtu.map_or(size, |path| size.min(path.into()));
        lab.send(0, 1, &vec![7; length]);
        lab.run(ms(50));
    }
    lab.nodes[1].received.len() - before
}

#[test]
fn reduced_path_mtu_is_detected_without_icmp() {
    let mut lab = Lab::joined_pair();
    lab.underlay.mtu = 1440 + OVERHEAD;
    assert_eq!(arrives(&mut lab, 1440, secs(10)), 200);
    assert_eq!(lab.view(0, 1).path_mtu, None);
    // The path carries less than the nodes' links, and no ICMP message says so.
    lab.underlay.mtu = 1372;
    lab.nodes[1].received.clear();
    arrives(&mut lab, 1440, secs(8));
    let late = arrives(&mut lab, 1440, secs(5));
    assert_eq!(late, 100, "All packets must arrive after eight seconds.");
    let path = usize::from(lab.view(0, 1).path_mtu.unwrap());
    assert!((1332..=1340).contains(&path), "{path}");
    assert_eq!(lab.state(0, 1), PeerState::Established);
    // The path becomes wider again.
    lab.underlay.mtu = 1440 + OVERHEAD;
    arrives(&mut lab, 1440, secs(130));
    assert_eq!(lab.view(0, 1).path_mtu, None);
}

#[test]
fn reduced_path_mtu_is_known_before_bulk_transfer() {
    let mut lab = Lab::new(2);
    lab.underlay.mtu = 1300;
    lab.flow(0, 1, ms(20));
    // A size below 1280 takes more probes.
    lab.run(secs(14));
    let path = usize::from(lab.view(0, 1).path_mtu.unwrap());
    assert!((1260..=1268).contains(&path), "{path}");
}

#[test]
fn loss_and_silence_do_not_reduce_path_mtu() {
    let mut lab = Lab::joined_pair();
    lab.underlay.loss_percent = 10;
    lab.underlay.mtu = 1440 + OVERHEAD;
    lab.flow(0, 1, ms(20));
    let mut narrow = 0;
    for _ in 0..600 {
        lab.run(secs(1));
        narrow += u32::from(lab.view(0, 1).path_mtu.is_some());
    }
    assert!(narrow < 60, "{narrow} of 600 seconds");
    lab.underlay.loss_percent = 0;
    lab.run(secs(130));
    lab.underlay.cut.extend([(0, 1), (1, 0)]);
    lab.run(secs(60));
    assert_eq!(lab.view(0, 1).path_mtu, None, "An unreachable peer must have no reduced path MTU.");
}

/// The sending node treats the smaller MTU of the peer as a reduced path MTU, which its pods must
/// know.
#[test]
fn smaller_mtu_of_peer_reduces_path_mtu() {
    let mut lab = Lab::new(2);
    lab.underlay.mtu = 1440 + OVERHEAD;
    lab.reconfigure(1, |config| config.mtu = 1360);
    lab.flow(0, 1, ms(20));
    lab.run(secs(1));
    assert_eq!(lab.view(0, 1).path_mtu, Some(1360));
    assert_eq!(
        lab.view(1, 0).path_mtu,
        None,
        "The path MTU of the peer with the smaller MTU must not be reduced."
    );
    lab.underlay.mtu = 1300 + OVERHEAD;
    lab.run(secs(15));
    assert!(lab.view(0, 1).path_mtu.is_some_and(|path| (1292..=1300).contains(&path)));
    lab.underlay.mtu = 1440 + OVERHEAD;
    lab.run(secs(130));
    assert_eq!(lab.view(0, 1).path_mtu, Some(1360));
}

/// Short and long datagrams are lost alike, and some arrive now and then.
#[test]
fn flapping_link_does_not_reduce_path_mtu() {
    for most in [200, 400, 800] {
        let mut lab = Lab::joined_pair();
        lab.underlay.mtu = 1440 + OVERHEAD;
        lab.flow(0, 1, ms(20));
        lab.flow(1, 0, ms(20));
        for _ in 0..2000 {
            let [away, there] = [0; 2].map(|_| 1 + lab.rng.next() % most);
            lab.underlay.cut.extend([(0, 1), (1, 0)]);
            lab.run(ms(away));
            lab.underlay.cut.clear();
            lab.run(ms(there));
            let found = [lab.view(0, 1).path_mtu, lab.view(1, 0).path_mtu];
            assert_eq!(found, [None, None], "away and there for up to {most} ms");
        }
    }
}

/// The MTUs of both nodes grow and shrink while sessions stay, without data traffic.
#[test]
fn own_mtu_change_reaches_peer_within_seconds() {
    let mut lab = Lab::joined_pair();
    lab.underlay.mtu = 9000;
    for (first, second) in [(8940, 8940), (1360, 1360), (1440, 1300), (1440, 1440)] {
        let before = lab.current(0, 1).unwrap();
        let now = lab.now;
        lab.nodes[0].engine.set_mtu(now, first);
        lab.nodes[1].engine.set_mtu(now, second);
        assert!(Arc::ptr_eq(&before, &lab.current(0, 1).unwrap()), "The session must stay.");
        lab.run(secs(10));
        assert_eq!(lab.view(0, 1).mtu, Some(second), "Node 0 must know the MTU of node 1.");
        assert_eq!(lab.view(1, 0).mtu, Some(first), "Node 1 must know the MTU of node 0.");
        assert_eq!(lab.view(0, 1).path_mtu, Some(second).filter(|mtu| *mtu < first));
        assert!(lab.joined(0, 1), "Both nodes must use the same session.");
    }
}
