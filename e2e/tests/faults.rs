//! What an underlay does to a network, and what comes of it: with figures.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_e2e::checks;
use skein_e2e::lab::agent::{Agent, Cluster};
use skein_e2e::lab::link::Offloads;
use skein_e2e::lab::{Family, Plan};
use skein_e2e::load::ping::{Ping, ping};
use skein_e2e::load::transfer::Transfer;

/// The MTU of the path to the other node, where the agent knows of a smaller one.
fn path_mtu(agent: &Agent) -> Result<Option<u64>> {
    let report = agent.report()?;
    Ok(report["peers"][0]["path_mtu"].as_u64())
}

/// Frames that are too long vanish in the switch, without a word: a tunnel or a wrong setting on the way.
#[test]
fn a_path_that_becomes_narrow_is_found_out_and_transfers_go_on() -> Result<()> {
    let plan = Plan { offloads: Offloads::Wire, ..Plan::default() };
    let cluster = Cluster::up(&plan, Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (lab, agents) = (&cluster.lab, &cluster.agents);
    let (a, b) = (lab.pod(0), lab.pod(1));
    checks::transfer(a, b, Family::V4, 4 << 20)?;
    ensure!(path_mtu(&agents[0])?.is_none(), "the path is as wide as the link");

    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 200 << 20, Some(10 << 20))?;
    std::thread::sleep(Duration::from_secs(2));
    lab.switch()?.ip(&format!("link set {} mtu 1400", lab.nodes[1].port()))?;
    let received = transfer.join().context("the transfer over the narrow path")?;
    println!(
        "the path became narrow: the transfer stood for {:.1} s at most",
        received.longest_pause
    );
    ensure!(received.longest_pause < 15.0, "{} s", received.longest_pause);

    // 1400 less 60 for the overlay; a bridge lets frames pass that are 4 bytes longer, for a VLAN's tag.
    let found = path_mtu(&agents[0])?.context("the path counts as wide")?;
    ensure!((1332..=1344).contains(&found), "{found}");
    // The port takes nothing longer from its cable, either.
    ensure!(path_mtu(&agents[1])?.is_some_and(|back| back.abs_diff(found) < 16), "the way back");
    ensure!(agents[0].metrics()?.sum("skein_narrow_paths", &[]) == 1.0);
    let routed = || {
        let routes = lab.nodes[0].ns.ip("route show proto 77")?;
        Ok(routes.contains(&format!("mtu {found}")))
    };
    checks::eventually("the route says so", Duration::from_secs(5), routed)?;

    // Whoever forbids fragments is told, and what fits arrives.
    let whole = |payload| Ping { count: 3, payload, whole: true, ..Ping::default() };
    let answers = ping(&a.ns, b.address(Family::V4), whole(1380))?;
    ensure!(answers.received == 0 && answers.text.contains("mtu"), "{}", answers.text);
    let answers = ping(&a.ns, b.address(Family::V4), whole(1280))?;
    ensure!(answers.complete(), "{}", answers.text);
    checks::transfer(a, b, Family::V4, 8 << 20)?;
    checks::transfer(b, a, Family::V4, 8 << 20)?;
    checks::transfer(a, b, Family::V6, 1 << 20).map(drop)
}
