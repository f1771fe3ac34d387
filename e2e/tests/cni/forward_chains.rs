//! FORWARD chains of other programs that drop packets, as those of Docker and ufw: the agent's
//! rules in them let packets of pods pass.

use std::net::IpAddr;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Result, ensure};
use skein_lab::agent::Cluster;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::load::udp;
use skein_lab::pods::{node, runtime, up};
use skein_lab::{Family, Netns, Pod, checks, process};

use crate::support::{outside, outside_address, reach};

/// Chains of other programs, one for each family.
const CHAINS: [&str; 2] = ["ip filter FORWARD", "ip6 filter FORWARD"];

/// A port that the chains of the other program drop.
const DROPPED_PORT: u16 = 7777;

/// Longer than the interval of ten seconds in which the agent compares the rules.
const NEXT_CHECK: Duration = Duration::from_secs(11);

/// Two nodes with pods: two on the first, one on the second.
struct Scene {
    cluster: Cluster,
    a: Pod,
    a2: Pod,
    b: Pod,
}

impl Scene {
    fn up(accept: bool) -> Result<Self> {
        let cluster = up(2, |agent| agent.set("cni.forward_accept", accept))?;
        let (first, second) = (runtime(&cluster, 0)?, runtime(&cluster, 1)?);
        let (a, a2, b) = (first.pod("a")?, first.pod("a2")?, second.pod("b")?);
        reach(&a, &b)?;
        Ok(Self { cluster, a, a2, b })
    }

    /// Returns a cluster whose first node has FORWARD chains with the policy drop, and in them the
    /// rules of the agent.
    fn closed() -> Result<Self> {
        let scene = Self::up(true)?;
        scene.close()?;
        scene.await_rules("The rules are in the closed chains.")?;
        Ok(scene)
    }

    /// Returns the network namespace of the first node.
    fn first_node(&self) -> &Netns {
        node(&self.cluster, 0)
    }

    /// Flushes the chains of the first node and sets their policy to drop, as the other program
    /// does when its service restarts. The commands are one transaction, so that a chain has its
    /// policy at every moment. Each chain has one rule of the other program, which drops the port
    /// [`DROPPED_PORT`].
    fn close(&self) -> Result<()> {
        CHAINS.iter().try_for_each(|chain| {
            let table = chain.trim_end_matches(" FORWARD");
            let hook = "{ type filter hook forward priority 0 ; policy drop ; }";
            self.first_node().nft(&format!(
                "add table {table}\nadd chain {chain} {hook}\nflush chain {chain}\n\
                 add rule {chain} udp dport {DROPPED_PORT} drop\n"
            ))
        })
    }

    /// Returns the number of the agent's rules in each chain.
    ///
    /// # Errors
    ///
    /// Returns an error if a rule of the agent precedes a rule of the other program.
    fn rules(&self) -> Result<Vec<usize>> {
        let count = |chain: &&str| {
            let text = self.first_node().sh(&format!("nft list chain {chain}"))?;
            let rules = text.lines().filter(|line| line.contains("skp*")).count();
            let is_behind = text.rfind("drop") < text.find("skp*");
            ensure!(is_behind, "A rule of the agent precedes another program's: {text}");
            Ok(rules)
        };
        CHAINS.iter().map(count).collect()
    }

    fn await_rules(&self, what: &str) -> Result<()> {
        checks::eventually(what, checks::EVENT_TIMEOUT, || Ok(self.rules()? == [3, 3])).map(drop)
    }

    /// Checks which packets pass the chains. With the agent's rules (`open`), packets of pods and
    /// packets to a hostPort pass. Without the rules, no packet passes. Packets that another
    /// program drops, and packets from an outside machine to a pod's address, never pass.
    fn filters(&self, open: bool) -> Result<()> {
        let Self { cluster, a, b, .. } = self;
        let outside = outside(cluster)?;
        self.first_node().nft(&format!(
            "add table ip ports\ndelete table ip ports\nadd table ip ports\n\
             add chain ip ports pre {{ type nat hook prerouting priority dstnat ; }}\n\
             add rule ip ports pre udp dport 8080 dnat to {}:8080\n",
            a.v4
        ))?;
        let passes = |from: &Netns, at: &Pod, to: IpAddr, port: u16| {
            udp::arrives(from, &at.ns, (to, port).into())
        };
        for family in Family::BOTH {
            let (inside, target) = (a.address(family), b.address(family));
            let between = passes(&a.ns, b, target, 7778)?;
            ensure!(between == open, "Packets between pods pass: {between} ({family}).");
            let dropped = passes(&a.ns, b, target, DROPPED_PORT)?;
            ensure!(!dropped, "Packets pass that another program drops ({family}).");
            let entered = passes(&outside, a, inside, 7778)?;
            ensure!(!entered, "Packets of an outside machine reach a pod ({family}).");
            let asks = ping(&a.ns, outside_address(family)?, Ping { count: 2, ..Ping::default() })?;
            ensure!(asks.complete() == open, "A pod pings the outside: {}", asks.text);
        }
        let underlay = cluster.lab.nodes[0].underlay(Family::V4);
        let host_port = passes(&outside, a, underlay, 8080)?;
        ensure!(host_port == open, "Packets to a hostPort pass: {host_port}.");
        Ok(())
    }
}

#[test]
fn closed_chain_is_reported_with_the_remedy_if_rules_are_off() -> Result<()> {
    let scene = Scene::up(false)?;
    scene.close()?;
    let log = || Ok::<_, anyhow::Error>(fs::read_to_string(scene.cluster.agents[0].log())?);
    checks::eventually("The log names the remedy.", checks::EVENT_TIMEOUT, || {
        let log = log()?;
        Ok(log.contains("chain ip6 filter FORWARD drops") && log.contains("-i skp+ -j ACCEPT"))
    })?;
    for family in Family::BOTH {
        checks::does_not_reach(&scene.a, &scene.b, family)?;
    }
    let ruleset = scene.first_node().sh("nft list ruleset")?;
    ensure!(!ruleset.contains("skein: pods"), "The agent added rules: {ruleset}");
    Ok(())
}

#[test]
fn pods_reach_each_other_through_closed_chains() -> Result<()> {
    let scene = Scene::closed()?;
    for pod in [&scene.b, &scene.a2] {
        reach(&scene.a, pod)?;
        reach(pod, &scene.a)?;
    }
    Ok(())
}

#[test]
fn closed_chains_pass_traffic_of_pods_only() -> Result<()> {
    Scene::closed()?.filters(true)
}

/// The rules are readable by iptables, and rules that iptables has restored are not added again.
#[test]
fn rules_survive_a_restore_by_iptables() -> Result<()> {
    let scene = Scene::closed()?;
    let netns = scene.first_node();
    for iptables in ["iptables-nft", "ip6tables-nft"] {
        let listed = netns.sh(&format!("{iptables} -S FORWARD"))?;
        for rule in [
            "-P FORWARD DROP",
            "-A FORWARD -i skp+ ",
            "-A FORWARD -i skein0 -o skp+ ",
            "-A FORWARD -o skp+ -m mark --mark 0x100000/0x100000 ",
        ] {
            ensure!(listed.contains(rule), "The rule `{rule}` is missing: {listed}");
        }
        let mut rules = listed.lines().filter(|line| line.contains("skp+"));
        let have_comment = rules.all(|rule| rule.contains("--comment \"skein: pods\""));
        ensure!(have_comment, "A rule has no comment: {listed}");
        // Some services save the rules when they stop, and restore them when they start.
        let saved = netns.sh(&format!("{iptables}-save"))?;
        let mut restore = netns.command(format!("{iptables}-restore"));
        process::run_with_input(&mut restore, saved.as_bytes())?;
    }
    thread::sleep(NEXT_CHECK);
    let rules = scene.rules()?;
    ensure!(rules == [3, 3], "The chains have {rules:?} rules of the agent.");
    Ok(())
}

#[test]
fn rules_are_restored_after_a_reload_of_the_chains() -> Result<()> {
    let scene = Scene::closed()?;
    for _ in 0..2 {
        scene.close()?;
        scene.await_rules("The rules are restored.")?;
    }
    reach(&scene.a, &scene.b)
}

#[test]
fn rules_move_behind_rules_that_are_added_later() -> Result<()> {
    let scene = Scene::closed()?;
    for chain in CHAINS {
        scene.first_node().sh(&format!("nft add rule {chain} udp dport 7778 drop"))?;
    }
    scene.await_rules("The rules are behind the new ones.")?;
    let arrived = udp::arrives(&scene.a.ns, &scene.b.ns, (scene.b.v4, 7778).into())?;
    ensure!(!arrived, "A packet passes that the new rule drops.");
    Ok(())
}

#[test]
fn rules_follow_the_setting() -> Result<()> {
    let mut scene = Scene::closed()?;
    for accept in [false, true] {
        let agent = &mut scene.cluster.agents[0];
        agent.stop()?;
        agent.set("cni.forward_accept", accept);
        agent.start()?;
        let rules = scene.first_node().sh("nft list chain ip filter FORWARD")?;
        ensure!(rules.contains("skp*") == accept, "With forward_accept = {accept}: {rules}");
        if !accept {
            scene.filters(false)?;
        }
    }
    Ok(())
}

#[test]
fn cleanup_removes_the_rules_and_no_others() -> Result<()> {
    let mut scene = Scene::closed()?;
    let agent = &mut scene.cluster.agents[0];
    agent.stop()?;
    let finished = agent.run_command(&["cleanup"])?;
    ensure!(finished.code == 0, "cleanup failed: {}{}", finished.stdout, finished.stderr);
    let rules = scene.first_node().sh("nft list ruleset")?;
    ensure!(!rules.contains("skp"), "A rule of the agent remains: {rules}");
    ensure!(rules.contains("7777"), "A rule of another program was removed: {rules}");
    Ok(())
}
