//! Chains of others that drop what they have no rule for (Docker's and ufw's FORWARD): an accept in a
//! table of ours saves nothing from them. So two rules that let pods' packets pass stand in each, at
//! its end: what a rule of somebody's drops stays dropped, only the chain's policy does not count.

use std::fmt;

use serde_json::Value;

use super::{FirewallError, nft};
use crate::netlink::pod::HOST_PREFIX;

/// By which of its interfaces a packet is a pod's. The overlay's own needs no rule: all that comes and goes
/// there is for a pod or from one.
const MATCHES: [&str; 2] = ["iifname", "oifname"];

/// A chain at the forward hook.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Chain {
    family: String,
    table: String,
    name: String,
    drops: bool,
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.family, self.table, self.name)
    }
}

/// What came of a look at others' chains.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Forward {
    /// Chains that have got a rule now.
    pub opened: Vec<String>,
    /// Chains that still drop pods' packets, and why.
    pub closed: Vec<String>,
}

/// Puts the rules of the agent that has the table of this name where they are missing; with `accept` unset it
/// says where they would be needed.
pub async fn ensure(table: &str, accept: bool) -> Forward {
    let mut forward = Forward::default();
    let chains = chains().await.unwrap_or_default();
    for chain in chains.iter().filter(|chain| chain.drops) {
        match open(chain, table, accept).await {
            Ok(false) => {}
            Ok(true) => forward.opened.push(chain.to_string()),
            Err(why) => forward.closed.push(format!(
                "chain {chain} drops what it has no rule for{why}: let pods' packets pass \
                 (iptables -I FORWARD -i {HOST_PREFIX}+ -j ACCEPT; \
                 iptables -I FORWARD -o {HOST_PREFIX}+ -j ACCEPT)"
            )),
        }
    }
    forward
}

/// Takes the rules away that [`ensure`] has made for that table; says whether there were any.
pub async fn remove(table: &str) -> Result<bool, FirewallError> {
    let mark = mark(table);
    let chains = match chains().await {
        Err(FirewallError::Missing) => return Ok(false),
        chains => chains?,
    };
    let mut text = String::new();
    for chain in chains {
        let ours = rules(&chain).await?.into_iter().filter(|rule| rule["comment"] == *mark);
        let handles = ours.filter_map(|rule| rule["handle"].as_u64());
        handles.for_each(|handle| text += &format!("delete rule {chain} handle {handle}\n"));
    }
    if text.is_empty() {
        return Ok(false);
    }
    nft(&["-f", "-"], &text).await?;
    Ok(true)
}

/// What the rules say of themselves, in `nft list` and in `iptables -S`.
fn mark(table: &str) -> String {
    format!("{table}: pods")
}

/// Whether something was missing that is there now; an error says why it is still missing.
async fn open(chain: &Chain, table: &str, accept: bool) -> Result<bool, String> {
    let because = |error: FirewallError| format!(", and cannot be changed ({error})");
    let present = rules(chain).await.map_err(because)?;
    let missing = MATCHES.iter().filter(|key| !present.iter().any(|rule| accepts(rule, key)));
    let mark = mark(table);
    let text: String = missing
        .map(|key| {
            format!("add rule {chain} {key} \"{HOST_PREFIX}*\" counter accept comment \"{mark}\"\n")
        })
        .collect();
    match (text.is_empty(), accept) {
        (true, _) => Ok(false),
        (false, false) => Err(String::new()),
        (false, true) => nft(&["-f", "-"], &text).await.map(|_| true).map_err(because),
    }
}

/// Whether a rule accepts all that has a pod's interface there, whoever made it: an administrator by hand,
/// or `iptables-restore` from what `iptables-save` saw of ours, which only nft's comment tells apart.
fn accepts(rule: &Value, key: &str) -> bool {
    let parts = rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default();
    let counts = |part: &&Value| part.get("counter").is_none() && part["xt"]["name"] != "comment";
    let parts: Vec<&Value> = parts.iter().filter(counts).collect();
    let [condition, verdict] = parts[..] else { return false };
    let condition = &condition["match"];
    verdict.get("accept").is_some()
        && condition["op"] == "=="
        && condition["left"]["meta"]["key"] == key
        && condition["right"] == format!("{HOST_PREFIX}*")
}

/// Every chain at the forward hook that sees packets of pods.
async fn chains() -> Result<Vec<Chain>, FirewallError> {
    let objects = objects(&["-j", "list", "chains"], "chain").await?;
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let ip = |chain: &Value| ["ip", "ip6", "inet"].contains(&word(&chain["family"]).as_str());
    let forward = objects.into_iter().filter(|chain| chain["hook"] == "forward" && ip(chain));
    let chain = |chain: Value| Chain {
        family: word(&chain["family"]),
        table: word(&chain["table"]),
        name: word(&chain["name"]),
        drops: chain["policy"] == "drop",
    };
    Ok(forward.map(chain).collect())
}

async fn rules(chain: &Chain) -> Result<Vec<Value>, FirewallError> {
    let Chain { family, table, name, .. } = chain;
    objects(&["-j", "list", "chain", family, table, name], "rule").await
}

async fn objects(arguments: &[&str], kind: &str) -> Result<Vec<Value>, FirewallError> {
    let text = nft(arguments, "").await?;
    let mut document: Value = serde_json::from_str(&text).unwrap_or_default();
    let all = document["nftables"].as_array_mut().map(std::mem::take).unwrap_or_default();
    Ok(all.into_iter().filter_map(|mut object| Some(object.get_mut(kind)?.take())).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rule(exprs: &[Value]) -> Value {
        json!({ "handle": 3, "expr": exprs })
    }

    #[test]
    fn a_rule_that_does_the_same_is_known_whoever_made_it() {
        let of = |key: &str, name: &str| json!({ "match": { "op": "==", "left": { "meta": { "key": key } }, "right": name } });
        let counter = json!({ "counter": { "packets": 0, "bytes": 0 } });
        let comment = json!({ "xt": { "type": "match", "name": "comment" } });
        let accept = json!({ "accept": null });
        let pods = of("iifname", "skp*");
        for same in [
            rule(&[pods.clone(), accept.clone()]),
            rule(&[pods.clone(), counter.clone(), accept.clone()]),
            rule(&[pods.clone(), comment, counter.clone(), accept.clone()]),
        ] {
            assert!(accepts(&same, "iifname"), "{same}");
            assert!(!accepts(&same, "oifname"), "{same}");
        }
        for other in [
            rule(&[pods.clone(), json!({ "drop": null })]),
            rule(&[of("iifname", "skp0"), accept.clone()]),
            rule(&[of("oifname", "docker0"), pods.clone(), accept.clone()]),
            rule(&[pods, counter]),
            rule(&[]),
        ] {
            assert!(!accepts(&other, "iifname"), "{other}");
        }
    }
}
