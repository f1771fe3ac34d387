//! An agent on every node of a laboratory.

use anyhow::Result;

use super::agent::Agent;
use super::{Family, Lab, Plan};

/// A laboratory with an agent on every node, each of which has the records of all nodes.
#[derive(Debug)]
pub struct Cluster {
    /// Agents in the order of the nodes. The field stands before `lab`, because the agents must be
    /// dropped before their namespaces.
    pub agents: Vec<Agent>,
    /// Laboratory in which the agents run.
    pub lab: Lab,
    /// Prints the ends of the logs when the value is dropped. Tests keep the default, true: the
    /// test runner shows the output of tests that failed.
    pub verbose: bool,
}

impl Cluster {
    /// Prepares an agent on every node and writes the records of all nodes for each. Starts no
    /// agent.
    ///
    /// # Errors
    /// If an agent cannot be prepared ([`Agent::prepare`]), or if a record cannot be written.
    pub fn prepare(lab: Lab, underlay: Family) -> Result<Self> {
        let agents = lab.nodes.iter().map(|node| Agent::prepare(&lab, node, underlay, 0));
        let agents = agents.collect::<Result<Vec<_>>>()?;
        for agent in &agents {
            agents.iter().try_for_each(|other| agent.put_record(&other.record))?;
        }
        Ok(Self { agents, lab, verbose: true })
    }

    /// Starts all agents and waits until they are ready.
    ///
    /// # Errors
    /// If an agent cannot be started, exits, or is not ready after 20 s.
    pub fn start(&mut self) -> Result<()> {
        self.agents.iter_mut().try_for_each(Agent::launch)?;
        self.agents.iter_mut().try_for_each(Agent::wait_ready)
    }

    /// Builds a laboratory and starts an agent on every node.
    ///
    /// # Errors
    /// If the laboratory cannot be built, or if an agent does not become ready.
    pub fn up(plan: &Plan, underlay: Family) -> Result<Self> {
        let mut cluster = Self::prepare(Lab::new(plan)?, underlay)?;
        cluster.start()?;
        Ok(cluster)
    }

    /// Returns the ends of all logs, for the message of a failure.
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
