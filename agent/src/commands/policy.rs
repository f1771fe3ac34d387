//! `skein-agent policy list`, `policy show` and `policy lint`.

use std::path::PathBuf;

use anyhow::anyhow;
use clap::{Args, Subcommand};

use super::{AgentArgs, Output, OutputArgs, json, print, runtime};
use crate::control::agent_client;
use crate::failure::Failure;
use crate::policy::lint::{Finding, lint};
use crate::policy::report::{PodReport, PodState, PolicySummary};
use crate::status::{Align, printable, table};

#[derive(Args)]
pub(crate) struct PolicyArgs {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Subcommand)]
enum PolicyCommand {
    /// List the policies that the agent knows
    List {
        #[command(flatten)]
        agent: AgentArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show the policies and rules that apply to a pod of this node
    Show {
        /// Pod as NAMESPACE/NAME (NAME alone: namespace default), or the pod's interface
        pod: String,
        #[command(flatten)]
        agent: AgentArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Check files with policies; works without a running agent; exit with code 1 if a part cannot
    /// be enforced
    Lint {
        /// Files in YAML or JSON
        #[arg(required = true)]
        files: Vec<PathBuf>,
        #[command(flatten)]
        output: OutputArgs,
    },
}

pub(crate) fn policy(arguments: &PolicyArgs) -> Result<(), Failure> {
    match &arguments.command {
        PolicyCommand::List { agent, output } => list(agent, *output),
        PolicyCommand::Show { pod, agent, output } => show(pod, agent, *output),
        PolicyCommand::Lint { files, output } => lint_files(files, *output),
    }
}

fn list(agent: &AgentArgs, output: OutputArgs) -> Result<(), Failure> {
    let agent = agent.agent()?;
    let answer = runtime()?.block_on(agent_client::policies(agent.socket()));
    let policies = answer.map_err(|error| agent.failure(error))?;
    print(&match output.output {
        Output::Json => json(&policies)?,
        Output::Table => render_policies(&policies),
    })
}

fn render_policies(policies: &[PolicySummary]) -> String {
    let rows = policies.iter().map(|policy| {
        let name = match policy.namespace.as_str() {
            "" => policy.name.clone(),
            namespace => format!("{namespace}/{}", policy.name),
        };
        let tier = match (&policy.tier, policy.priority) {
            (Some(tier), Some(priority)) => format!("{tier} {priority}"),
            _ => "-".to_owned(),
        };
        let (pods, defects) = (policy.pods.to_string(), policy.defects.len().to_string());
        let cells = [policy.kind.clone(), name, tier, policy.directions.join(","), pods, defects];
        cells.map(|cell| printable(&cell)).to_vec()
    });
    let columns = [
        ("KIND", Align::Left),
        ("NAME", Align::Left),
        ("TIER", Align::Left),
        ("DIRECTIONS", Align::Left),
        ("PODS HERE", Align::Right),
        ("DEFECTS", Align::Right),
    ];
    table(&columns, rows) + "\n"
}

fn show(pod: &str, agent: &AgentArgs, output: OutputArgs) -> Result<(), Failure> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '/');
    if pod.is_empty() || !pod.chars().all(plain) {
        return Err(Failure::Usage(format!("{pod:?} is not a pod. Use NAMESPACE/NAME.")));
    }
    let agent = agent.agent()?;
    let answer = runtime()?.block_on(agent_client::policies_of_pod(agent.socket(), pod));
    let reports = answer.map_err(|error| agent.failure(error))?;
    print(&match output.output {
        Output::Json => json(&reports)?,
        Output::Table => reports.iter().map(render_pod).collect::<Vec<_>>().join("\n"),
    })
}

fn render_pod(report: &PodReport) -> String {
    let labels: Vec<_> =
        report.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let addresses: Vec<_> = report.addresses.iter().map(ToString::to_string).collect();
    let state = match report.state {
        PodState::Enforced => "policies are enforced",
        PodState::WithoutPolicies => "no policy can apply; the pod's object is not known yet",
        PodState::Quarantined => {
            "quarantine: the pod's object is not known; all forwarded traffic is refused"
        }
    };
    let mut lines = vec![
        format!("pod        {}", if report.pod.is_empty() { "unknown" } else { &report.pod }),
        format!("interface  {}", report.interface),
        format!("addresses  {}", addresses.join(" ")),
        format!("labels     {}", if labels.is_empty() { "-".to_owned() } else { labels.join(",") }),
        format!("state      {state}"),
    ];
    for direction in &report.directions {
        let isolated = match direction.isolated {
            true => "isolated: traffic that no rule allows is refused",
            false => "not isolated by a NetworkPolicy",
        };
        lines.push(format!("{:<10} {isolated}", direction.direction));
        for policy in &direction.policies {
            lines.push(format!("  {} ({})", policy.policy, policy.tier));
            lines.extend(policy.rules.iter().map(|rule| format!("    {rule}")));
            let defects = policy.defects.iter();
            lines.extend(defects.map(|defect| format!("    not enforced: {defect}")));
        }
    }
    lines.iter().map(|line| printable(line) + "\n").collect()
}

fn lint_files(files: &[PathBuf], output: OutputArgs) -> Result<(), Failure> {
    let findings = lint(files);
    print(&match output.output {
        Output::Json => json(&findings)?,
        Output::Table => findings.iter().map(|one| render_finding(one) + "\n").collect(),
    })?;
    match findings.iter().filter(|finding| finding.error).count() {
        0 => Ok(()),
        1 => Err(Failure::Runtime(anyhow!("1 part of the policies cannot be enforced"))),
        count => Err(Failure::Runtime(anyhow!("{count} parts of the policies cannot be enforced"))),
    }
}

fn render_finding(finding: &Finding) -> String {
    let kind = if finding.error { "error" } else { "warning" };
    let parts = [&*finding.file, &*finding.object, &*finding.field, &*finding.text];
    let place: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    printable(&format!("{kind}: {}", place.join(": ")))
}
