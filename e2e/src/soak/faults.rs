//! What befalls the nodes. Each fault undoes itself: when it is over, traffic must go on by itself.

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

/// How long the agents may take to be what they were.
const LIMIT: Duration = Duration::from_secs(20);

/// The node whose data process somebody else has started, as in the chart: only such a one is taken
/// over.
const EXTERNAL: usize = 0;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Kind {
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

impl Kind {
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

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KillAgent => "agent killed (-9)",
            Self::KillDataProcess => "data process killed (-9)",
            Self::KillKeeper => "keeper and data process killed (-9)",
            Self::RestartAgent => "agent restarted",
            Self::TakeOverAgent => "agent taken over",
            Self::TakeOverDataProcess => "data process taken over",
            Self::Suspend => "host suspended for 2 s",
            Self::CableOut => "cable out for 1 to 4 s",
            Self::CableFlaps => "cable out and in six times",
            Self::Loss => "1 to 20 % lost for 5 s",
            Self::OneWayLoss => "all lost in one direction for 1 to 3 s",
            Self::NarrowPath => "path of 1400 bytes for 8 s",
            Self::EndpointMoves => "endpoint moved",
            Self::RecordRemoved => "record removed for 1.5 s",
        })
    }
}

/// The agents and all that befalls them.
pub(super) struct World<'a> {
    pub(super) lab: &'a Lab,
    agents: &'a mut [Agent],
    external: Process,
}

impl<'a> World<'a> {
    /// Starts all agents.
    pub(super) fn start(agents: &'a mut [Agent], lab: &'a Lab) -> Result<Self> {
        agents[EXTERNAL].set("dataplane.mode", "external");
        let external = agents[EXTERNAL].start_dataplane()?;
        agents.iter_mut().try_for_each(Agent::launch)?;
        agents.iter_mut().try_for_each(Agent::wait_ready)?;
        Ok(Self { lab, agents, external })
    }

    /// What is not as it should be when all is over.
    pub(super) fn wellness(&self) -> Vec<String> {
        let reached = checks::all_reach_all(self.lab).err().map(|error| format!("{error:#}"));
        let ready = self.agents.iter().filter_map(|agent| {
            let answer = agent.http("/readyz");
            let well = answer.as_ref().is_ok_and(|answer| answer.status == 200);
            (!well).then(|| format!("{} is not ready: {answer:?}", agent.record.name))
        });
        reached.into_iter().chain(ready).collect()
    }

    /// Starts the external data process again where it has ended, as kubelet does.
    pub(super) fn supervise(&mut self) -> Result<()> {
        if self.external.exited().is_some() {
            self.external = self.agents[EXTERNAL].start_dataplane()?;
        }
        Ok(())
    }

    pub(super) fn befall(&mut self, kind: Kind, node: usize, random: &mut Random) -> Result<()> {
        let agent = &mut self.agents[node];
        let mut seconds = |from: u64, to: u64| {
            let more = random.below(((to - from) * 1000) as usize) as u64;
            Duration::from_millis(from * 1000 + more)
        };
        match kind {
            Kind::KillAgent => {
                agent.kill_control();
                thread::sleep(Duration::from_millis(500));
                agent.start()
            }
            Kind::KillDataProcess => {
                let before = agent.dataplane_pids();
                signal(&before, Signal::KILL)?;
                comes_back(agent, || agent.dataplane_pids() != before)
            }
            Kind::KillKeeper => {
                let before = agent.keeper_pids();
                signal(&before, Signal::KILL)?;
                // An external one is started again as kubelet does it: until it stays. What the one
                // before has started ends a moment after it, and holds the socket meanwhile.
                let external = &mut self.external;
                let back = || {
                    if node == EXTERNAL && external.exited().is_some() {
                        *external = agent.start_dataplane()?;
                    }
                    Ok(agent.keeper_pids() != before && agent.report().is_ok())
                };
                checks::eventually("another data process is at work", LIMIT, back).map(drop)
            }
            Kind::RestartAgent => {
                let code = agent.stop()?;
                ensure!(code == 0, "the agent ended with code {code}");
                agent.start()
            }
            Kind::TakeOverAgent => {
                let mut before = self.agents[EXTERNAL].take_over()?;
                gives_way(&mut before)
            }
            Kind::TakeOverDataProcess => {
                let next = self.agents[EXTERNAL].take_over_dataplane()?;
                let mut before = std::mem::replace(&mut self.external, next);
                gives_way(&mut before)
            }
            Kind::Suspend => {
                let pids = agent.pids();
                signal(&pids, Signal::STOP)?;
                thread::sleep(Duration::from_secs(2));
                signal(&pids, Signal::CONT)
            }
            Kind::CableOut => {
                self.lab.set_cable(node, false)?;
                thread::sleep(seconds(1, 4));
                self.lab.set_cable(node, true)
            }
            Kind::CableFlaps => (0..6).try_for_each(|_| {
                self.lab.set_cable(node, false)?;
                thread::sleep(Duration::from_millis(150));
                self.lab.set_cable(node, true)?;
                thread::sleep(Duration::from_millis(250));
                Ok(())
            }),
            Kind::Loss => {
                let percent = 1 + random.below(20);
                let port = self.lab.nodes[node].port();
                let some = format!("numgen random mod 100 < {percent} drop");
                let rules = [format!("iifname {port} {some}"), format!("oifname {port} {some}")];
                self.while_dropping(&rules, Duration::from_secs(5))
            }
            Kind::OneWayLoss => {
                let all = format!("oifname {} drop", self.lab.nodes[node].port());
                self.while_dropping(&[all], seconds(1, 3))
            }
            Kind::NarrowPath => {
                let (switch, port) = (self.lab.switch()?, self.lab.nodes[node].port());
                switch.ip(&format!("link set {port} mtu 1400"))?;
                thread::sleep(Duration::from_secs(8));
                switch.ip(&format!("link set {port} mtu 1500")).map(drop)
            }
            Kind::EndpointMoves => self.move_endpoint(node),
            Kind::RecordRemoved => {
                let record = self.agents[node].record.clone();
                let others = || self.agents.iter().filter(|other| other.record.name != record.name);
                others().try_for_each(|other| other.remove_record(&record.name))?;
                thread::sleep(Duration::from_millis(1500));
                others().try_for_each(|other| other.put_record(&record))
            }
        }
    }

    /// Has the switch drop what these rules say for a while.
    fn while_dropping(&self, rules: &[String], time: Duration) -> Result<()> {
        let switch = self.lab.switch()?;
        let rules: String = rules.iter().map(|rule| format!("{rule}\n")).collect();
        switch.nft(&format!(
            "table bridge lossy {{\nchain forward {{\ntype filter hook forward priority 0;\n{rules}}}\n}}\n"
        ))?;
        thread::sleep(time);
        switch.nft("delete table bridge lossy\n")
    }

    /// Gives a node another address, and tells the others; the next time its first one again.
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
    ensure!(!pids.is_empty(), "there is no such process");
    let mut pids = pids.iter().filter_map(|&pid| Pid::from_raw(pid));
    pids.try_for_each(|pid| kill_process(pid, signal)).context("sending a signal")
}

/// Waits until another data process answers.
fn comes_back(agent: &Agent, is_another: impl Fn() -> bool) -> Result<()> {
    let back = || Ok(is_another() && agent.report().is_ok());
    checks::eventually("another data process is at work", LIMIT, back).map(drop)
}

/// Waits until one that was taken over from has ended, or only waits to be ended.
fn gives_way(before: &mut Process) -> Result<()> {
    let command_line = format!("/proc/{}/cmdline", before.pid());
    let gone = || {
        let waits = std::fs::read(&command_line).is_ok_and(|line| line.ends_with(b"\0hold\0"));
        Ok(waits || before.exited().is_some())
    };
    checks::eventually("the one before gives way", LIMIT, gone).map(drop)
}
