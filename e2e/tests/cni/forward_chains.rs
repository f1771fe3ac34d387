//! FORWARD chains of other programs that drop packets, as those of Docker and ufw.

use std::net::IpAddr;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Result, ensure};
use skein_lab::load::ping::{Ping, ping};
use skein_lab::load::udp;
use skein_lab::pods::{node, runtime, up};
use skein_lab::{Family, Netns, Pod, checks, process};

use crate::support::{outside, outside_address, reach};

/// What Docker and ufw do to every other packet of a node.
#[test]
fn others_chains_that_drop_let_pods_pass() -> Result<()> {
    let mut cluster = up(2, |agent| {
        // The second node is told to leave others' chains alone.
        let accept = agent.record.name == "node-a";
        agent.set("cni.forward_accept", accept);
    })?;
    let (a, b) = (runtime(&cluster, 0)?.pod("a")?, runtime(&cluster, 1)?.pod("b")?);
    let a2 = runtime(&cluster, 0)?.pod("a2")?;
    reach(&a, &b)?;
    let chains = ["ip filter FORWARD", "ip6 filter FORWARD"];
    // As a service that is started anew does: at no moment is the chain without its policy.
    let close = |home: &Netns| -> Result<()> {
        chains.iter().try_for_each(|chain| {
            let table = chain.trim_end_matches(" FORWARD");
            let hook = "{ type filter hook forward priority 0 ; policy drop ; }";
            // Somebody's own rule, which stays in force.
            let text = format!(
                "add table {table}\nadd chain {chain} {hook}\nflush chain {chain}\n\
                 add rule {chain} udp dport 7777 drop\n"
            );
            home.nft(&text)
        })
    };
    // What is no pod's and comes beside the overlay.
    let outside = outside(&cluster)?;
    // The outside's way to a pod by a hostPort.
    node(&cluster, 0).nft(&format!(
        "add table ip ports\nadd chain ip ports pre {{ type nat hook prerouting priority dstnat ; }}\n\
         add rule ip ports pre udp dport 8080 dnat to {}:8080\n",
        a.v4
    ))?;
    let filtered = |open: bool| -> Result<()> {
        let udp = |from: &Netns, at: &Pod, to: IpAddr, port: u16| {
            udp::arrives(from, &at.ns, (to, port).into())
        };
        let underlay = cluster.lab.nodes[0].underlay(Family::V4);
        for family in Family::BOTH {
            let (inside, target) = (a.address(family), b.address(family));
            ensure!(udp(&a.ns, &b, target, 7778)? == open, "among pods");
            ensure!(!udp(&a.ns, &b, target, 7777)?, "somebody's drop");
            ensure!(!udp(&outside, &a, inside, 7778)?, "from anybody");
            let asks = ping(&a.ns, outside_address(family)?, Ping { count: 2, ..Ping::default() })?;
            ensure!(asks.complete() == open, "a pod asks the outside: {}", asks.text);
        }
        ensure!(udp(&outside, &a, underlay, 8080)? == open, "a hostPort");
        Ok(())
    };
    let other = node(&cluster, 1);
    close(other)?;
    checks::eventually("the log says what helps", Duration::from_secs(15), || {
        let log = fs::read_to_string(cluster.agents[1].log())?;
        Ok(log.contains("chain ip6 filter FORWARD drops") && log.contains("-i skp+ -j ACCEPT"))
    })?;
    for family in Family::BOTH {
        checks::does_not_reach(&a, &b, family)?;
    }
    ensure!(!other.sh("nft list ruleset")?.contains("skein: pods"), "not asked for");
    chains.iter().try_for_each(|chain| other.sh(&format!("nft delete chain {chain}")).map(drop))?;

    let home = node(&cluster, 0);
    let ours = || -> Result<Vec<usize>> {
        let count = |chain: &&str| {
            let text = home.sh(&format!("nft list chain {chain}"))?;
            let rules: Vec<_> =
                text.lines().map(str::trim).filter(|l| l.contains("skp*")).collect();
            ensure!(text.rfind("drop") < text.find("skp*"), "before somebody's own: {text}");
            Ok(rules.len())
        };
        chains.iter().map(count).collect()
    };
    close(home)?;
    for _ in 0..2 {
        checks::eventually("the rules are there", Duration::from_secs(15), || {
            Ok(ours()? == [3, 3])
        })?;
        for pod in [&b, &a2] {
            reach(&a, pod)?;
            reach(pod, &a)?;
        }
        // They are readable by iptables, too, and those that are there are not made again.
        for iptables in ["iptables-nft", "ip6tables-nft"] {
            let said = home.sh(&format!("{iptables} -S FORWARD"))?;
            for rule in [
                "-P FORWARD DROP",
                "-A FORWARD -i skp+ ",
                "-A FORWARD -i skein0 -o skp+ ",
                "-A FORWARD -o skp+ -m mark --mark 0x100000/0x100000 ",
            ] {
                ensure!(said.contains(rule), "{said}");
            }
            let mut rules = said.lines().filter(|line| line.contains("skp+"));
            ensure!(rules.all(|rule| rule.contains("--comment \"skein: pods\"")), "{said}");
            // As a service does that keeps rules over a restart.
            let saved = home.sh(&format!("{iptables}-save"))?;
            let mut restore = home.command(format!("{iptables}-restore"));
            process::run_with_input(&mut restore, saved.as_bytes())?;
        }
        thread::sleep(Duration::from_secs(11));
        ensure!(ours()? == [3, 3], "{:?}", ours()?);
        filtered(true)?;
        // Whoever reloads his firewall takes them away.
        close(home)?;
    }
    checks::eventually("they are put back", Duration::from_secs(15), || Ok(ours()? == [3, 3]))?;
    // They stay behind what is added later.
    for chain in chains {
        home.sh(&format!("nft add rule {chain} udp dport 7778 drop"))?;
    }
    checks::eventually("they go behind it", Duration::from_secs(15), || Ok(ours().is_ok()))?;
    ensure!(ours()? == [3, 3] && !udp::arrives(&a.ns, &b.ns, (b.v4, 7778).into())?);
    // Not wanted any more, and wanted again.
    for accept in [false, true] {
        cluster.agents[0].stop()?;
        cluster.agents[0].set("cni.forward_accept", accept);
        cluster.agents[0].start()?;
        let rules = node(&cluster, 0).sh("nft list chain ip filter FORWARD")?;
        ensure!(rules.contains("skp*") == accept, "{rules}");
        if !accept {
            filtered(false)?;
        }
    }
    cluster.agents[0].stop()?;
    let finished = cluster.agents[0].run_command(&["cleanup"])?;
    ensure!(finished.code == 0, "{}{}", finished.stdout, finished.stderr);
    let rules = node(&cluster, 0).sh("nft list ruleset")?;
    ensure!(!rules.contains("skp") && rules.contains("7777"), "{rules}");
    Ok(())
}
