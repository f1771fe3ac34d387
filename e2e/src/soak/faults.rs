//! Faults that the soak test injects. Each fault ends after a limited time. Then traffic must
//! continue without an intervention.

use std::fmt;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process};

use super::Random;
use skein_lab::agent::Agent;
use skein_lab::checks;
use skein_lab::process::Process;
use skein_lab::{Family, Lab, UNDERLAY};

/// Maximum time until the processes run again after a fault.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(20);

/// Index of the node whose data process is external, as in the chart. Faults with a take-over use
/// the processes of this node only.
const EXTERNAL: usize = 0;

/// A kind of fault. The text of `Display` names it in tables and messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Fault {
    KillAgent,
    KillDataProcess,
    KillKeeper,
    RestartAgent,
    TakeOverAgent,
    TakeOverDataProcess,
    Suspend,
    CableOut,
    CableFlaps,
    Loss,
    OneWayLoss,
    NarrowPath,
    EndpointMoves,
    RecordRemoved,
}

impl Fault {
    pub(super) const ALL: [Self; 14] = [
        Self::KillAgent,
        Self::KillDataProcess,
        Self::KillKeeper,
        Self::RestartAgent,
        Self::TakeOverAgent,
        Self::TakeOverDataProcess,
        Self::Suspend,
        Self::CableOut,
        Self::CableFlaps,
        Self::Loss,
        Self::OneWayLoss,
        Self::NarrowPath,
        Self::EndpointMoves,
        Self::RecordRemoved,
    ];
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KillAgent => "agent killed (-9)",
            Self::KillDataProcess => "data process killed (-9)",
            Self::KillKeeper => "keeper and data process killed (-9)",
            Self::RestartAgent => "agent restarted",
            Self::TakeOverAgent => "agent taken over",
            Self::TakeOverDataProcess => "data process taken over",
            Self::Suspend => "host suspended for 2 s",
            Self::CableOut => "link down for 1 to 4 s",
            Self::CableFlaps => "link down and up six times",
            Self::Loss => "loss of 1 to 20 % for 5 s",
            Self::OneWayLoss => "one direction down for 1 to 3 s",
            Self::NarrowPath => "path of 1400 bytes for 8 s",
            Self::EndpointMoves => "endpoint moved",
            Self::RecordRemoved => "record removed for 1.5 s",
        })
    }
}

/// Owner of the agents, which injects faults into them and into the network.
pub(super) struct FaultInjector<'a> {
    pub(super) lab: &'a Lab,
    agents: &'a mut [Agent],
    external: Process,
}

impl<'a> FaultInjector<'a> {
    /// Starts all agents, the first with an external data process.
    ///
    /// # Errors
    /// If an agent does not become ready.
    pub(super) fn start(agents: &'a mut [Agent], lab: &'a Lab) -> Result<Self> {
        agents[EXTERNAL].set("dataplane.mode", "external");
        let external = agents[EXTERNAL].start_dataplane()?;
        agents.iter_mut().try_for_each(Agent::launch)?;
        agents.iter_mut().try_for_each(Agent::wait_ready)?;
        Ok(Self { lab, agents, external })
    }

    /// Returns the problems at the end of the run: pods that do not reach each other, and agents
    /// that are not ready.
    pub(super) fn check_health(&self) -> Vec<String> {
        let reached = checks::all_reach_all(self.lab).err().map(|error| format!("{error:#}"));
        let ready = self.agents.iter().filter_map(|agent| {
            let answer = agent.http("/readyz");
            let is_ready = answer.as_ref().is_ok_and(|answer| answer.status == 200);
            (!is_ready).then(|| format!("{} is not ready: {answer:?}", agent.record.name))
        });
        reached.into_iter().chain(ready).collect()
    }

    /// Restarts the external data process if it has exited, as kubelet would.
    pub(super) fn supervise(&mut self) -> Result<()> {
        if self.external.exited().is_some() {
            self.external = self.agents[EXTERNAL].start_dataplane()?;
        }
        Ok(())
    }

    pub(super) fn inject(&mut self, fault: Fault, node: usize, random: &mut Random) -> Result<()> {
        let agent = &mut self.agents[node];
        let mut seconds = |from: u64, to: u64| {
            let more = random.below(((to - from) * 1000) as usize) as u64;
            Duration::from_millis(from * 1000 + more)
        };
        match fault {
            Fault::KillAgent => {
                agent.kill_control();
                thread::sleep(Duration::from_millis(500));
                agent.start()
            }
            Fault::KillDataProcess => {
                let before = agent.dataplane_pids();
                signal(&before, Signal::KILL)?;
                wait_for_new_process(agent, || agent.dataplane_pids() != before)
            }
            Fault::KillKeeper => {
                let before = agent.keeper_pids();
                signal(&before, Signal::KILL)?;
                // The external keeper is restarted until it runs, as by kubelet. The data process
                // of the killed keeper exits a moment later and uses the socket until then.
                let external = &mut self.external;
                let back = || {
                    if node == EXTERNAL && external.exited().is_some() {
                        *external = agent.start_dataplane()?;
                    }
                    Ok(agent.keeper_pids() != before && agent.report().is_ok())
                };
                checks::eventually("another data process runs", RECOVERY_TIMEOUT, back).map(drop)
            }
            Fault::RestartAgent => {
                let code = agent.stop()?;
                ensure!(code == 0, "the agent ended with code {code}");
                agent.start()
            }
            Fault::TakeOverAgent => {
                let mut previous = self.agents[EXTERNAL].take_over()?;
                wait_for_hand_over(&mut previous)
            }
            Fault::TakeOverDataProcess => {
                let next = self.agents[EXTERNAL].take_over_dataplane()?;
                let mut previous = std::mem::replace(&mut self.external, next);
                wait_for_hand_over(&mut previous)
            }
            Fault::Suspend => {
                let pids = agent.pids();
                signal(&pids, Signal::STOP)?;
                thread::sleep(Duration::from_secs(2));
                signal(&pids, Signal::CONT)
            }
            Fault::CableOut => {
                self.lab.set_cable(node, false)?;
                thread::sleep(seconds(1, 4));
                self.lab.set_cable(node, true)
            }
            Fault::CableFlaps => (0..6).try_for_each(|_| {
                self.lab.set_cable(node, false)?;
                thread::sleep(Duration::from_millis(150));
                self.lab.set_cable(node, true)?;
                thread::sleep(Duration::from_millis(250));
                Ok(())
            }),
            Fault::Loss => {
                let percent = 1 + random.below(20);
                let port = self.lab.nodes[node].port();
                let some = format!("numgen random mod 100 < {percent} drop");
                let rules = [format!("iifname {port} {some}"), format!("oifname {port} {some}")];
                self.while_dropping(&rules, Duration::from_secs(5))
            }
            Fault::OneWayLoss => {
                let all = format!("oifname {} drop", self.lab.nodes[node].port());
                self.while_dropping(&[all], seconds(1, 3))
            }
            Fault::NarrowPath => {
                let (switch, port) = (self.lab.switch()?, self.lab.nodes[node].port());
                switch.ip(&format!("link set {port} mtu 1400"))?;
                thread::sleep(Duration::from_secs(8));
                switch.ip(&format!("link set {port} mtu 1500")).map(drop)
            }
            Fault::EndpointMoves => self.move_endpoint(node),
            Fault::RecordRemoved => {
                let record = self.agents[node].record.clone();
                let others = || self.agents.iter().filter(|other| other.record.name != record.name);
                others().try_for_each(|other| other.remove_record(&record.name))?;
                thread::sleep(Duration::from_millis(1500));
                others().try_for_each(|other| other.put_record(&record))
            }
        }
    }

    /// Adds nftables rules to the switch for `time`.
    fn while_dropping(&self, rules: &[String], time: Duration) -> Result<()> {
        let switch = self.lab.switch()?;
        let rules: String = rules.iter().map(|rule| format!("{rule}\n")).collect();
        switch.nft(&format!(
            "table bridge lossy {{\nchain forward {{\ntype filter hook forward priority 0;\n{rules}}}\n}}\n"
        ))?;
        thread::sleep(time);
        switch.nft("delete table bridge lossy\n")
    }

    /// Changes a node's underlay address, and its record on all nodes. The address alternates
    /// between the original one and another.
    fn move_endpoint(&mut self, node: usize) -> Result<()> {
        let first = self.lab.nodes[node].underlay(Family::V4).to_string();
        let other = format!("192.0.2.{}", 70 + node);
        let now = self.agents[node].underlay_address()?.to_string();
        let next = if now == first { other } else { first };
        let ns = &self.lab.nodes[node].ns;
        ns.sysctl("net.ipv4.conf.all.promote_secondaries", "1")?;
        ns.ip(&format!("address add {next}/24 dev {UNDERLAY}"))?;
        ns.ip(&format!("address del {now}/24 dev {UNDERLAY}"))?;
        self.agents[node].record.endpoints = vec![format!("{next}:{}", skein_lab::agent::PORT)];
        let record = self.agents[node].record.clone();
        self.agents.iter().try_for_each(|agent| agent.put_record(&record))
    }
}

fn signal(pids: &[i32], signal: Signal) -> Result<()> {
    ensure!(!pids.is_empty(), "no process to send {signal:?} to");
    let mut pids = pids.iter().filter_map(|&pid| Pid::from_raw(pid));
    pids.try_for_each(|pid| kill_process(pid, signal)).context("sending a signal")
}

/// Waits until a new data process answers.
fn wait_for_new_process(agent: &Agent, is_another: impl Fn() -> bool) -> Result<()> {
    let back = || Ok(is_another() && agent.report().is_ok());
    checks::eventually("another data process runs", RECOVERY_TIMEOUT, back).map(drop)
}

/// Waits until a process that handed over has exited, or runs as `skein-agent hold`.
fn wait_for_hand_over(previous: &mut Process) -> Result<()> {
    let command_line = format!("/proc/{}/cmdline", previous.pid());
    let gone = || {
        let holds = std::fs::read(&command_line).is_ok_and(|line| line.ends_with(b"\0hold\0"));
        Ok(holds || previous.exited().is_some())
    };
    checks::eventually("the previous process has handed over", RECOVERY_TIMEOUT, gone).map(drop)
}
