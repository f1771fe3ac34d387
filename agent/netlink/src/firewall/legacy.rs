//! Chains of legacy iptables (ip_tables, not nf_tables), which `nft` does not show.

use std::process::Stdio;

use tokio::process::Command;

use crate::nftables::NFT_TIMEOUT;

/// List of the tables in use, and the program that shows them, for each family.
const FAMILIES: [(&str, &str); 2] = [
    ("/proc/net/ip_tables_names", "iptables-legacy"),
    ("/proc/net/ip6_tables_names", "ip6tables-legacy"),
];

/// State of legacy FORWARD chains.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Legacy {
    /// Chains that drop packets of `interface`, each with the remedy.
    pub(super) closed: Vec<String>,
    /// Chains whose policy is not known, each with the reason.
    pub(super) unknown: Vec<String>,
}

/// Reads the FORWARD chains of the families whose table filter is in use. `interface` is the name
/// of the interfaces that must pass, in the notation of iptables (`skp+`).
///
/// The program needs CAP_NET_RAW, which the agent drops at start. Only `skein-agent check` can read
/// the policy.
pub(super) async fn inspect(interface: &str) -> Legacy {
    let mut legacy = Legacy::default();
    for (names, program) in FAMILIES {
        // The file does not exist in a kernel without ip_tables. The program is not run then,
        // because it would load the module.
        let in_use = std::fs::read_to_string(names).unwrap_or_default();
        if !in_use.lines().any(|table| table == "filter") {
            continue;
        }
        match rules(program).await {
            Some(text) if drops(&text, interface) => legacy.closed.push(format!(
                "chain FORWARD of {program} drops pods' packets by its policy: let them pass \
                 ({program} -A FORWARD -i {interface} -j ACCEPT; \
                 {program} -A FORWARD -o {interface} -j ACCEPT)"
            )),
            Some(_) => {}
            None => legacy.unknown.push(format!(
                "chain FORWARD of {program} is in use, and the agent cannot read its policy: run \
                 skein-agent check or {program} -S FORWARD on the node"
            )),
        }
    }
    legacy
}

/// Returns the chain FORWARD as the program prints it; `None` if the program fails.
async fn rules(program: &str) -> Option<String> {
    let mut command = Command::new(program);
    command.args(["-w", "5", "-S", "FORWARD"]).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(NFT_TIMEOUT, command.output()).await.ok()?.ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Returns whether a FORWARD chain, as `-S` prints it, drops packets from or to the interfaces.
fn drops(text: &str, interface: &str) -> bool {
    let has = |rule: &str| text.lines().any(|line| line.trim() == rule);
    let accepted = has("-A FORWARD -j ACCEPT")
        || has(&format!("-A FORWARD -i {interface} -j ACCEPT"))
            && has(&format!("-A FORWARD -o {interface} -j ACCEPT"));
    has("-P FORWARD DROP") && !accepted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_counts_unless_rules_accept_both_directions() {
        let chain = |rules: &[&str]| format!("-P FORWARD DROP\n{}\n", rules.join("\n"));
        let (from, to) = ("-A FORWARD -i skp+ -j ACCEPT", "-A FORWARD -o skp+ -j ACCEPT");
        assert!(drops(&chain(&[]), "skp+"));
        assert!(
            drops(&chain(&[from]), "skp+"),
            "One direction is not sufficient, because answers are dropped."
        );
        assert!(drops(&chain(&["-A FORWARD -i docker0 -j ACCEPT"]), "skp+"));
        assert!(!drops(&chain(&[from, to]), "skp+"));
        assert!(!drops(&chain(&["-A FORWARD -j ACCEPT"]), "skp+"));
        assert!(!drops("-P FORWARD ACCEPT\n", "skp+"));
    }
}
