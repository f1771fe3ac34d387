//! An agent on every node of a laboratory.

use anyhow::Result;

use super::agent::Agent;
use super::{Family, Lab, Plan};

/// Agents on every node of a laboratory that know each other.
#[derive(Debug)]
pub struct Cluster {
    /// One a node. (Before `lab`: they end first.)
    pub agents: Vec<Agent>,
    /// Where they run.
    pub lab: Lab,
    /// Whether the ends of the logs are printed when this is dropped. Tests leave it on: the test
    /// runner shows what a test printed if the test failed.
    pub verbose: bool,
}

impl Cluster {
    /// Prepares an agent on every node and gives each the records of all; starts nothing.
    pub fn prepare(lab: Lab, underlay: Family) -> Result<Self> {
        let agents = lab.nodes.iter().map(|node| Agent::prepare(&lab, node, underlay, 0));
        let agents = agents.collect::<Result<Vec<_>>>()?;
        for agent in &agents {
            agents.iter().try_for_each(|other| agent.put_record(&other.record))?;
        }
        Ok(Self { agents, lab, verbose: true })
    }

    /// Starts all agents and waits until they are ready.
    pub fn start(&mut self) -> Result<()> {
        self.agents.iter_mut().try_for_each(Agent::launch)?;
        self.agents.iter_mut().try_for_each(Agent::wait_ready)
    }

    /// Prepares and starts.
    pub fn up(plan: &Plan, underlay: Family) -> Result<Self> {
        let mut cluster = Self::prepare(Lab::new(plan)?, underlay)?;
        cluster.start()?;
        Ok(cluster)
    }

    /// The ends of all logs, for the message of a failure.
    pub fn logs(&self) -> String {
        self.agents.iter().map(Agent::log_tail).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.verbose {
            eprintln!("{}", self.logs());
        }
    }
}
