//! Accept rules for pods in forward chains of other programs whose policy is drop (Docker's and
//! ufw's FORWARD). An accept verdict in Skein's own table does not prevent a drop in another table.
//! The rules are at the end of each chain: rules of the other program keep their effect, and only
//! the chain's policy does not apply to pods.
//!
//! `iptables` can read these rules. It refuses to list or change a table with a rule that it cannot
//! read (`ct state`), so a chain of Skein's own table evaluates the state of the connection and
//! sets a mark ([`MARK`]).

use std::fmt;

use serde_json::{Value, json};
use thiserror::Error;

use super::legacy;
use crate::nftables::{FirewallError, nft};
use crate::pod::HOST_PREFIX;

/// Mark on packets to a pod that belong to a connection of the pod, or whose destination was
/// translated to the pod (a hostPort, a Service). Skein's table sets the mark after routing, and
/// the kernel clears it on the way into the pod, so only the forward and postrouting hooks see it.
pub(super) const MARK: u32 = 0x0010_0000;

/// Comment of the rules in `nft list` and `iptables -S`.
const COMMENT: &str = "skein: pods";

/// Chain at the forward hook.
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

impl Chain {
    /// Returns whether `nft` reads the names of the table and the chain as words. Another program
    /// may have created a name with spaces or semicolons over netlink, which would be further
    /// commands.
    fn has_plain_names(&self) -> bool {
        let is_word = |name: &str| {
            let first = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
            let other = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
            first && name.chars().all(other)
        };
        is_word(&self.table) && is_word(&self.name)
    }
}

/// Result of a pass over the forward chains of other programs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ForwardReport {
    /// Chains to which rules were added.
    pub opened: Vec<String>,
    /// Chains that drop pods' packets, each with the reason and the remedy.
    pub errors: Vec<String>,
    /// Chains whose policy is not known, each with the reason.
    pub unknown: Vec<String>,
    /// True if `nft` listed the chains.
    pub read: bool,
}

/// Accept rule: its text for `nft`, and its conditions in the form of `nft -j`.
struct AcceptRule {
    text: String,
    conditions: Vec<Value>,
}

/// Returns the rules for packets that must pass: packets from pods, packets to pods from the
/// overlay's `interface`, and packets with [`MARK`]. Without the CNI plugin (`with_pods` unset)
/// pods' interfaces can have any name, so the rules accept all packets that enter or leave the
/// overlay.
fn wanted(interface: &str, with_pods: bool) -> Vec<AcceptRule> {
    let pods = format!("{HOST_PREFIX}*");
    let name = |key: &str, name: &str| {
        (format!("{key} \"{name}\""), equals(json!({ "meta": { "key": key } }), json!(name)))
    };
    let bit = json!({ "&": [{ "meta": { "key": "mark" } }, MARK] });
    let mark = (format!("meta mark & {MARK} == {MARK}"), equals(bit, json!(MARK)));
    let conditions = match with_pods {
        true => vec![
            vec![name("iifname", &pods)],
            vec![name("iifname", interface), name("oifname", &pods)],
            vec![name("oifname", &pods), mark],
        ],
        false => vec![vec![name("iifname", interface)], vec![name("oifname", interface)]],
    };
    let wanted = |parts: Vec<(String, Value)>| {
        let (texts, conditions): (Vec<String>, _) = parts.into_iter().unzip();
        AcceptRule { text: texts.join(" "), conditions }
    };
    conditions.into_iter().map(wanted).collect()
}

fn equals(left: Value, right: Value) -> Value {
    json!({ "match": { "op": "==", "left": left, "right": right } })
}

/// Adds the missing rules; with `accept` unset, only reports the chains that need them. `pods` is
/// true if the CNI plugin creates the pods' interfaces.
pub async fn ensure(interface: &str, pods: bool, accept: bool) -> ForwardReport {
    let mut forward = ForwardReport::default();
    let chains = match chains().await {
        Ok(chains) => chains,
        // The table reports the same error.
        Err(FirewallError::Missing) => return forward,
        Err(error) => {
            forward.unknown.push(format!("chains of other programs: {error}"));
            return forward;
        }
    };
    forward.read = true;
    let wanted = wanted(interface, pods);
    let name = if pods { format!("{HOST_PREFIX}+") } else { interface.to_owned() };
    let remedy = format!(
        "let pods' packets pass (iptables -A FORWARD -i {name} -j ACCEPT; \
         iptables -A FORWARD -o {name} -j ACCEPT)"
    );
    let remedy = if pods { format!("set cni.forward_accept, or {remedy}") } else { remedy };
    for chain in chains.iter().filter(|chain| chain.drops) {
        match add_rules(chain, &wanted, accept).await {
            Ok(false) => {}
            Ok(true) => forward.opened.push(chain.to_string()),
            Err(why) => forward
                .errors
                .push(format!("chain {chain} drops pods' packets by its policy{why}: {remedy}")),
        }
    }
    let legacy = legacy::inspect(&name).await;
    forward.errors.extend(legacy.closed);
    forward.unknown.extend(legacy.unknown);
    forward
}

/// Reason why rules of [`ensure`] may remain.
#[derive(Debug, Error)]
pub enum RemovalError {
    /// The chains cannot be listed.
    #[error(transparent)]
    List(#[from] FirewallError),
    /// Chains that could not be changed; each entry has the error.
    #[error("{}", .0.join("; "))]
    Chains(Vec<String>),
}

/// Reason why a chain of another program still drops packets of pods, as the end of a sentence.
#[derive(Debug, Error)]
enum StillClosed {
    /// Rules must not be added.
    #[error("")]
    NotAccepted,
    #[error(", and cannot be changed (nft does not read its name)")]
    Name,
    #[error(", and cannot be changed ({0})")]
    Firewall(#[from] FirewallError),
}

/// Removes the rules of [`ensure`] from all chains. Returns whether there were any. Continues after
/// an error.
///
/// # Errors
/// [`RemovalError`] with the chains that could not be changed, or if the chains cannot be listed.
pub async fn remove() -> Result<bool, RemovalError> {
    let chains = match chains().await {
        Err(FirewallError::Missing) => return Ok(false),
        chains => chains?,
    };
    let (mut removed, mut errors) = (false, Vec::new());
    for chain in &chains {
        match remove_rules(chain).await {
            Ok(some) => removed |= some,
            Err(error) => errors.push(format!("chain {chain}: {error}")),
        }
    }
    match errors.is_empty() {
        true => Ok(removed),
        false => Err(RemovalError::Chains(errors)),
    }
}

async fn remove_rules(chain: &Chain) -> Result<bool, FirewallError> {
    // `add_rules` does not change such a chain either.
    if !chain.has_plain_names() {
        return Ok(false);
    }
    let present = rules(chain).await?;
    let text = deletions(chain, &split_by_owner(&present).0);
    match text.is_empty() {
        true => Ok(false),
        false => nft(&["-f", "-"], &text).await.map(|_| true),
    }
}

/// Adds the missing rules to a chain. Returns whether rules were added.
///
/// # Errors
/// [`StillClosed`] if rules are missing and were not added.
async fn add_rules(
    chain: &Chain,
    wanted: &[AcceptRule],
    accept: bool,
) -> Result<bool, StillClosed> {
    if !chain.has_plain_names() {
        return Err(StillClosed::Name);
    }
    let present = rules(chain).await?;
    match (changes(chain, &present, wanted), accept) {
        (None, _) => Ok(false),
        (Some(_), false) => Err(StillClosed::NotAccepted),
        (Some(text), true) => {
            nft(&["-f", "-"], &text).await?;
            Ok(true)
        }
    }
}

/// Returns the transaction that puts the missing rules at the end of the chain. `None` if no change
/// is needed: rules of any owner accept all packets that must pass, and no rule of Skein precedes a
/// rule that drops.
fn changes(chain: &Chain, present: &[Value], wanted: &[AcceptRule]) -> Option<String> {
    let (ours, others) = split_by_owner(present);
    let missing: Vec<_> =
        wanted.iter().filter(|wanted| !others.iter().any(|rule| accepts(rule, wanted))).collect();
    let same = ours.len() == missing.len()
        && missing.iter().all(|wanted| ours.iter().any(|rule| accepts(rule, wanted)));
    let before_others = present
        .iter()
        .skip_while(|rule| !ours.contains(rule))
        .any(|rule| !ours.contains(&rule) && conditions(rule).is_none());
    if same && !before_others {
        return None;
    }
    let mut text = deletions(chain, &ours);
    for AcceptRule { text: condition, .. } in missing {
        text += &format!("add rule {chain} {condition} counter accept comment \"{COMMENT}\"\n");
    }
    Some(text)
}

fn deletions(chain: &Chain, rules: &[&Value]) -> String {
    let handles = rules.iter().filter_map(|rule| rule["handle"].as_u64());
    handles.map(|handle| format!("delete rule {chain} handle {handle}\n")).collect()
}

/// Divides rules into those of the agent and all others. The comment of rules that
/// `iptables-restore` has restored is not visible to `nft`. Such rules about pods count as the
/// agent's if the rule with the mark, which no other program writes, is among them.
fn split_by_owner(present: &[Value]) -> (Vec<&Value>, Vec<&Value>) {
    let pods = Value::from(format!("{HOST_PREFIX}*"));
    let restored = |rule: &Value, right: &Value| {
        parts(rule).iter().any(is_comment)
            && conditions(rule)
                .is_some_and(|parts| parts.iter().any(|part| part["match"]["right"] == *right))
    };
    let all_restored = present.iter().any(|rule| restored(rule, &json!(MARK)));
    present
        .iter()
        .partition(|rule| rule["comment"] == COMMENT || all_restored && restored(rule, &pods))
}

/// Returns whether `rule` accepts all packets of `wanted`.
fn accepts(rule: &Value, wanted: &AcceptRule) -> bool {
    conditions(rule)
        .is_some_and(|conditions| conditions.iter().all(|part| wanted.conditions.contains(part)))
}

/// Returns the conditions of an accept rule; `None` for other rules.
fn conditions(rule: &Value) -> Option<Vec<&Value>> {
    let counts = |part: &&Value| part.get("counter").is_none() && !is_comment(part);
    let mut parts: Vec<&Value> = parts(rule).iter().filter(counts).collect();
    parts.pop().filter(|verdict| verdict.get("accept").is_some())?;
    Some(parts)
}

fn parts(rule: &Value) -> &[Value] {
    rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn is_comment(part: &Value) -> bool {
    part["xt"]["name"] == "comment"
}

/// Returns all chains at the forward hook that can see packets of pods.
///
/// # Errors
/// [`FirewallError`] if `nft` fails or its output is malformed.
async fn chains() -> Result<Vec<Chain>, FirewallError> {
    Ok(read_chains(objects(&["-j", "list", "chains"], "chain").await?))
}

fn read_chains(objects: Vec<Value>) -> Vec<Chain> {
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let ip = |chain: &Value| ["ip", "ip6", "inet"].contains(&word(&chain["family"]).as_str());
    let forward = objects.into_iter().filter(|chain| chain["hook"] == "forward" && ip(chain));
    let chain = |chain: Value| Chain {
        family: word(&chain["family"]),
        table: word(&chain["table"]),
        name: word(&chain["name"]),
        drops: chain["policy"] == "drop",
    };
    forward.map(chain).collect()
}

/// Fuzzing entry point: for any rules, the transaction adds at most the wanted rules.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_printed(text: &str) {
    let (Ok(chains), Ok(rules)) = (read_objects(text, "chain"), read_objects(text, "rule")) else {
        return;
    };
    for chain in read_chains(chains) {
        let wanted = wanted("skein0", true);
        let text = changes(&chain, &rules, &wanted).unwrap_or_default();
        let added = text.lines().filter(|line| line.starts_with("add rule ")).count();
        assert!(added <= wanted.len());
    }
}

async fn rules(chain: &Chain) -> Result<Vec<Value>, FirewallError> {
    let Chain { family, table, name, .. } = chain;
    objects(&["-j", "list", "chain", family, table, name], "rule").await
}

async fn objects(arguments: &[&str], kind: &str) -> Result<Vec<Value>, FirewallError> {
    read_objects(&nft(arguments, "").await?, kind)
}

fn read_objects(text: &str, kind: &str) -> Result<Vec<Value>, FirewallError> {
    let unreadable = || FirewallError::Unreadable(text.chars().take(80).collect());
    let mut document: Value = serde_json::from_str(text).map_err(|_| unreadable())?;
    let all = document.get_mut("nftables").and_then(Value::as_array_mut);
    let all = all.map(std::mem::take).ok_or_else(unreadable)?;
    Ok(all.into_iter().filter_map(|mut object| Some(object.get_mut(kind)?.take())).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Documents that are no JSON objects; a fuzzer has found the case.
    #[test]
    fn json_without_rules_is_an_error() {
        for text in ["7", "[]", "null", "{}", r#"{"nftables": 7}"#] {
            assert!(read_objects(text, "rule").is_err(), "{text}");
        }
    }

    fn chain() -> Chain {
        let [family, table, name] = ["ip", "filter", "FORWARD"].map(str::to_owned);
        Chain { family, table, name, drops: true }
    }

    fn name(key: &str, name: &str) -> Value {
        equals(json!({ "meta": { "key": key } }), json!(name))
    }

    fn rule(handle: u64, conditions: &[Value], verdict: &str) -> Value {
        let mut parts = conditions.to_vec();
        parts.push(json!({ "counter": { "packets": 0, "bytes": 0 } }));
        parts.push(json!({ verdict: null }));
        json!({ "handle": handle, "expr": parts })
    }

    fn ours() -> Vec<Value> {
        let all = wanted("skein0", true).into_iter().zip(10..);
        let rule = |(wanted, handle): (AcceptRule, u64)| {
            let mut rule = rule(handle, &wanted.conditions, "accept");
            rule["comment"] = COMMENT.into();
            rule
        };
        all.map(rule).collect()
    }

    #[test]
    fn chain_whose_name_is_a_command_is_left_alone() {
        assert!(chain().has_plain_names());
        let text = r#"{"nftables": [
            {"chain": {"family": "ip", "table": "t", "name": "f; flush ruleset", "hook": "forward",
             "policy": "drop"}},
            {"chain": {"family": "ip", "table": "a b", "name": "f", "hook": "forward",
             "policy": "drop"}},
            {"chain": {"family": "ip", "table": "t", "name": "", "hook": "forward",
             "policy": "drop"}},
            {"chain": {"family": "ip", "table": "-f", "name": "f", "hook": "forward",
             "policy": "drop"}}]}"#;
        let chains = read_chains(read_objects(text, "chain").unwrap());
        assert_eq!(chains.len(), 4);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for chain in chains {
            // Without the check, `nft` would refuse the name or run it, which gives another error.
            let refused = runtime.block_on(add_rules(&chain, &[], true)).unwrap_err();
            assert!(matches!(refused, StillClosed::Name), "{chain}: {refused}");
            assert!(!runtime.block_on(remove_rules(&chain)).unwrap(), "{chain}");
        }
    }

    #[test]
    fn missing_rules_are_added_and_present_rules_stay() {
        let changes = |present: &[Value]| changes(&chain(), present, &wanted("skein0", true));
        let added =
            |text: Option<String>| text.unwrap().matches("add rule ip filter FORWARD").count();
        let drop = rule(1, &[name("iifname", "skp*")], "drop");
        assert_eq!(added(changes(&[])), 3);
        assert_eq!(
            added(changes(std::slice::from_ref(&drop))),
            3,
            "A drop rule must not count as an accept rule."
        );
        assert_eq!(changes(&ours()), None);
        let mut later = ours();
        later.insert(0, drop.clone());
        assert_eq!(changes(&later), None, "Rules at the end of the chain need no change.");
        later.push(rule(2, &[name("oifname", "docker0")], "accept"));
        assert_eq!(changes(&later), None, "An accept rule behind the rules must not move them.");
        later.push(drop);
        let text = changes(&later).unwrap();
        assert_eq!(text.matches("delete rule ip filter FORWARD handle 1").count(), 3, "{text}");
        assert_eq!(added(Some(text)), 3, "The rules must move to the end.");
        let two = &ours()[..2];
        let text = changes(two).unwrap();
        assert!(text.contains("delete") && added(Some(text.clone())) == 3, "{text}");
    }

    #[test]
    fn rules_of_an_administrator_count_and_stay() {
        let wanted = wanted("skein0", true);
        let wide = |handle, key| rule(handle, &[name(key, "skp*")], "accept");
        let by_hand = [wide(1, "iifname"), wide(2, "oifname")];
        assert_eq!(changes(&chain(), &by_hand, &wanted), None);
        assert_eq!(
            changes(&chain(), &[rule(1, &[], "accept")], &wanted),
            None,
            "A rule that accepts all packets is sufficient."
        );
        let text = changes(&chain(), &by_hand[1..], &wanted).unwrap();
        assert!(text.contains("iifname \"skp*\" counter") && text.lines().count() == 1, "{text}");
        let mut both = by_hand.to_vec();
        both.extend(ours());
        let text = changes(&chain(), &both, &wanted).unwrap();
        assert!(
            text.lines().count() == 3 && !text.contains("add"),
            "Superfluous rules of the agent must be removed: {text}"
        );
        let other = rule(1, &[name("oifname", "docker0"), name("iifname", "skp*")], "accept");
        assert!(!accepts(&other, &wanted[0]));
    }

    #[test]
    fn own_rules_are_recognised_by_their_comment() {
        let comment = json!({ "xt": { "type": "match", "name": "comment" } });
        let ours_of = |present: &[Value]| split_by_owner(present).0.len();
        let restored: Vec<Value> = ours()
            .into_iter()
            .map(|mut rule| {
                rule.as_object_mut().unwrap().remove("comment");
                rule["expr"].as_array_mut().unwrap().insert(0, comment.clone());
                rule
            })
            .collect();
        assert_eq!(ours_of(&restored), 3);
        assert_eq!(changes(&chain(), &restored, &wanted("skein0", true)), None);
        // Rules of an administrator, with or without a comment, are not the agent's.
        assert_eq!(ours_of(&restored[..2]), 0);
        assert_eq!(ours_of(&[rule(1, &[name("iifname", "skp*")], "accept")]), 0);
        let docker = rule(1, &[name("iifname", "docker0"), comment], "accept");
        assert_eq!(ours_of(&[restored, vec![docker]].concat()), 3);
        // The name of the overlay's interface has changed.
        let text = changes(&chain(), &ours(), &wanted("wan0", true)).unwrap();
        assert!(text.contains("handle 11") && text.contains("\"wan0\""), "{text}");
    }
}
