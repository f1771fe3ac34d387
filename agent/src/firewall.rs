//! The firewall of pods, in an nftables table of its own: a pod sends from its own addresses only,
//! and reaches the outside by the node's.
//!
//! The rules are handed to the `nft` program as text, in one transaction: what is written here is what
//! `nft list table inet skein` shows at three in the morning. Nothing in it changes when a pod comes
//! or goes: a pod's host route is what says which address belongs to which interface.

pub mod forward;

use std::fmt::Write as _;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;
use thiserror::Error;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::netlink::pod::HOST_PREFIX;

/// How long `nft` may take.
const LIMIT: Duration = Duration::from_secs(10);

/// What the table is to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Name of the table, of the family inet.
    pub table: String,
    /// The overlay's interface.
    pub interface: String,
    /// Pods of this node.
    pub local: Vec<IpNet>,
    /// Where a pod keeps its own address: the pods of all nodes, and what the operator adds.
    pub inside: Vec<IpNet>,
    /// Whether pods reach everything else by the node's address.
    pub masquerade: bool,
    /// Whether pods' packets are to pass others' chains ([`forward`]).
    pub forward_accept: bool,
}

/// Why the table is not as it should be.
#[derive(Debug, Error)]
pub enum FirewallError {
    /// There is no such program.
    #[error("no program nft: install nftables")]
    Missing,
    /// It could not be run.
    #[error("cannot run nft: {0}")]
    Io(#[from] io::Error),
    /// It refused.
    #[error("nft refused: {0}")]
    Refused(String),
    /// It says what nobody understands.
    #[error("cannot read what nft says: {0}")]
    Unreadable(String),
    /// It hung.
    #[error("nft did not end within {LIMIT:?}")]
    Late,
}

/// Packets that pods sent from addresses that are not theirs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forged {
    /// Of IPv4.
    pub ipv4: u64,
    /// Of IPv6.
    pub ipv6: u64,
}

/// The table as it was put in place.
#[derive(Debug)]
pub struct Firewall {
    rules: Rules,
    /// What `nft` listed right after: anything else later was somebody's hand.
    listed: Option<String>,
}

impl Firewall {
    /// Nothing is in place yet.
    pub fn new(rules: Rules) -> Self {
        Self { rules, listed: None }
    }

    /// Takes other rules; [`Firewall::ensure`] puts them in place.
    pub fn set_rules(&mut self, rules: Rules) {
        if self.rules != rules {
            self.rules = rules;
            self.listed = None;
        }
    }

    /// Puts the table in place unless it is; says whether it was not.
    pub async fn ensure(&mut self) -> Result<bool, FirewallError> {
        let table = self.rules.table.as_str();
        if let Some(listed) = &self.listed
            && list(table).await.is_ok_and(|now| now == *listed)
        {
            return Ok(false);
        }
        let text = self.rules.text();
        if nft(&["-f", "-"], &text).await.is_err() {
            // Chains or sets of another make by that name: an older agent's.
            let anew = format!("{}{text}", delete(table));
            nft(&["-f", "-"], &anew).await?;
        }
        self.listed = Some(list(table).await?);
        Ok(true)
    }
}

/// What was dropped by the source check; `None` where there is no table.
pub async fn forged(table: &str) -> Option<Forged> {
    read_forged(&nft(&["-j", "list", "counters", "table", "inet", table], "").await.ok()?)
}

/// For the fuzzer: all that is read of what `nft -j` prints.
pub(crate) fn fuzz_printed(text: &str) {
    let _ = read_forged(text);
    forward::fuzz_printed(text);
}

fn read_forged(text: &str) -> Option<Forged> {
    let document: Value = serde_json::from_str(text).ok()?;
    let packets = |name: &str| {
        let objects = document["nftables"].as_array()?.iter();
        let mut counters = objects.filter_map(|object| object.get("counter"));
        counters.find(|counter| counter["name"] == name)?["packets"].as_u64()
    };
    Some(Forged { ipv4: packets("forged_ipv4")?, ipv6: packets("forged_ipv6")? })
}

/// Takes the table away; says whether it was there.
pub async fn remove(table: &str) -> Result<bool, FirewallError> {
    match list(table).await {
        Err(FirewallError::Refused(why)) if why.contains("No such file") => return Ok(false),
        Err(FirewallError::Missing) => return Ok(false),
        listed => listed?,
    };
    nft(&["-f", "-"], &delete(table)).await?;
    Ok(true)
}

fn delete(table: &str) -> String {
    format!("add table inet {table}\ndelete table inet {table}\n")
}

impl Rules {
    /// Declares what is missing, empties what is there, fills it: one transaction that keeps the counters.
    fn text(&self) -> String {
        let Self { table, interface, masquerade, forward_accept, .. } = self;
        let mut text = format!(
            "table inet {table} {{
    counter forged_ipv4 {{ }}
    counter forged_ipv6 {{ }}
    set local4 {{ type ipv4_addr; flags interval; auto-merge; }}
    set local6 {{ type ipv6_addr; flags interval; auto-merge; }}
    set inside4 {{ type ipv4_addr; flags interval; auto-merge; }}
    set inside6 {{ type ipv6_addr; flags interval; auto-merge; }}
    chain sources {{ type filter hook prerouting priority raw; policy accept; }}
    chain outward {{ type nat hook postrouting priority srcnat; policy accept; }}
    chain passing {{ type filter hook forward priority raw; policy accept; }}
}}
"
        );
        for chain in ["sources", "outward", "passing"] {
            let _ = writeln!(text, "flush chain inet {table} {chain}");
        }
        for (set, nets, v4) in [
            ("local4", &self.local, true),
            ("local6", &self.local, false),
            ("inside4", &self.inside, true),
            ("inside6", &self.inside, false),
        ] {
            let _ = writeln!(text, "flush set inet {table} {set}");
            let nets: Vec<_> = nets.iter().filter(|net| net.addr().is_ipv4() == v4).collect();
            for net in nets {
                let _ = writeln!(text, "add element inet {table} {set} {{ {net} }}");
            }
        }
        // Asked with the interface it came in by, the routing table knows a pod's own addresses only.
        // Link-local and unspecified sources are the kernel's neighbour discovery; no node forwards them.
        // A pod is nobody's router.
        let _ = write!(
            text,
            "table inet {table} {{
    chain sources {{
        iifname != \"{HOST_PREFIX}*\" accept
        icmpv6 type {{ nd-router-advert, nd-redirect }} drop
        ip6 saddr {{ ::, fe80::/10 }} accept
        meta nfproto ipv4 fib saddr . iif oif missing counter name forged_ipv4 drop
        meta nfproto ipv6 fib saddr . iif oif missing counter name forged_ipv6 drop
    }}
"
        );
        if *masquerade {
            let _ = write!(
                text,
                "    chain outward {{
        oifname \"{interface}\" accept
        oifname \"{HOST_PREFIX}*\" accept
        ip saddr @local4 ip daddr != @inside4 masquerade fully-random
        ip6 saddr @local6 ip6 daddr != @inside6 masquerade fully-random
    }}
"
            );
        }
        if *forward_accept {
            let mark = forward::MARK;
            let _ = write!(
                text,
                "    chain passing {{
        oifname != \"{HOST_PREFIX}*\" accept
        ct state established,related meta mark set meta mark | {mark}
        ct status dnat meta mark set meta mark | {mark}
    }}
"
            );
        }
        text.push_str("}\n");
        if !*forward_accept {
            let _ = writeln!(text, "delete chain inet {table} passing");
        }
        text
    }
}

/// The table without its counters' values.
async fn list(table: &str) -> Result<String, FirewallError> {
    nft(&["--stateless", "list", "table", "inet", table], "").await
}

async fn nft(arguments: &[&str], input: &str) -> Result<String, FirewallError> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => FirewallError::Missing,
            _ => FirewallError::Io(error),
        })?;
    let stdin = child.stdin.take();
    let talk = async {
        if let Some(mut stdin) = stdin {
            // One that ends without reading says why by its exit code.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(LIMIT, talk).await.map_err(|_| FirewallError::Late)??;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.lines().next().unwrap_or_default();
        return Err(FirewallError::Refused(line.to_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
