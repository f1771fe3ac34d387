//! Rights of the chart's pods at the API server: the admission policy and the token of the service
//! account.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_lab::chart::{object, render, rendered};
use skein_lab::programs;

#[test]
fn policy_limits_agents_to_their_own_node() -> Result<()> {
    let kind = "kind: ValidatingAdmissionPolicy\n";
    ensure!(!render(&[], "1.29")?.contains(kind), "The policy is rendered for Kubernetes 1.29.");
    ensure!(render(&[], "1.30")?.contains(kind), "The policy is missing for Kubernetes 1.30.");
    let off = render(&["admissionPolicy.enabled=false"], "1.34")?;
    ensure!(!off.contains(kind), "The policy is rendered although it is switched off.");
    let policies = rendered(&[])?;
    let policy = object(&policies, "ValidatingAdmissionPolicy", "skein-own-node")?;
    let condition = policy["spec"]["matchConditions"][0]["expression"].to_string();
    let is_agents = condition.contains("system:serviceaccount:net:skein");
    ensure!(is_agents, "The condition does not name the service account: {condition}");
    object(&policies, "ValidatingAdmissionPolicyBinding", "skein-own-node")?;
    check_decisions_of_policy(policy)
}

/// A request of an agent on node `a`, or of `user`, and the validations that refuse it.
struct Decision {
    case: &'static str,
    operation: &'static str,
    resource: &'static str,
    new: Value,
    old: Value,
    refused_by: &'static [&'static str],
}

/// Returns a Node in which the value at a JSON pointer is replaced; null removes it.
fn changed_node(pointer: &str, value: Value) -> Value {
    let mut node = json!({
        "metadata": { "name": "a", "labels": { "zone": "1" }, "annotations": { "b": "c" } },
        "spec": {
            "podCIDR": "10.1.0.0/24",
            "taints": [
                { "key": "skein.network/agent-not-ready", "effect": "NoSchedule" },
                { "key": "other", "effect": "NoExecute" },
            ],
        },
        "status": {
            "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }],
            "conditions": [
                { "type": "Ready", "status": "True" },
                { "type": "NetworkUnavailable", "status": "True" },
            ],
        },
    });
    let (parent, key) = pointer.rsplit_once('/').unwrap_or_default();
    if let Some(map) = node.pointer_mut(parent).and_then(Value::as_object_mut) {
        match value {
            Value::Null => drop(map.remove(key)),
            value => drop(map.insert(key.to_owned(), value)),
        }
    }
    node
}

fn record(name: &str, metadata: &Value) -> Value {
    let mut record = json!({ "metadata": metadata, "spec": { "publicKey": "k" } });
    record["metadata"]["name"] = name.into();
    record
}

fn owner(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Node", "name": name, "uid": "1" })
}

/// Writes of an agent to its Node.
fn decisions_about_nodes() -> Vec<Decision> {
    let taint = |key: &str, effect: &str| json!({ "key": key, "effect": effect });
    let ours = || taint("skein.network/agent-not-ready", "NoSchedule");
    let other = || taint("other", "NoExecute");
    let condition = |kind: &str, status: &str| json!({ "type": kind, "status": status });
    let (ready, up) = (condition("Ready", "True"), condition("NetworkUnavailable", "False"));
    let node = || changed_node("", Value::Null);
    let update = |case, pointer: &str, value: Value, refused_by| Decision {
        case,
        operation: "UPDATE",
        resource: "nodes",
        new: changed_node(pointer, value),
        old: node(),
        refused_by,
    };
    let (spec, status) = (&["spec"][..], &["status"][..]);
    vec![
        update("unchanged", "", Value::Null, &[]),
        update("the taint is removed", "/spec/taints", json!([other()]), &[]),
        update("another taint is removed", "/spec/taints", json!([ours()]), spec),
        update("a taint is added", "/spec/taints", json!([ours(), other(), taint("x", "y")]), spec),
        update("all taints are removed", "/spec/taints", Value::Null, spec),
        update("cordoned", "/spec/unschedulable", json!(true), spec),
        Decision {
            case: "un-cordoned",
            old: changed_node("/spec/unschedulable", json!(true)),
            ..update("", "", Value::Null, spec)
        },
        update("pod CIDR", "/spec/podCIDR", json!("10.2.0.0/24"), spec),
        update("the condition", "/status/conditions", json!([ready, up]), &[]),
        update("another condition", "/status/conditions", json!([up]), status),
        update("the condition is removed", "/status/conditions", json!([ready]), status),
        update("addresses", "/status/addresses", json!([]), status),
        update("no addresses", "/status/addresses", Value::Null, status),
        update("labels", "/metadata/labels", json!({ "zone": "2" }), &["metadata"]),
        update("no labels", "/metadata/labels", Value::Null, &["metadata"]),
        update("annotations", "/metadata/annotations", json!({}), &["metadata"]),
        update("finalizers", "/metadata/finalizers", json!(["x"]), &["metadata"]),
        update("owner", "/metadata/ownerReferences", json!([owner("a")]), &["owners"]),
        update("another Node", "/metadata/name", json!("b"), &["own"]),
        Decision {
            case: "a new Node",
            operation: "CREATE",
            old: Value::Null,
            ..update("", "/metadata", json!({ "name": "a" }), &["operation", "spec", "status"])
        },
    ]
}

/// Writes of an agent to records and events.
fn decisions_about_records() -> Vec<Decision> {
    let write = |case, operation, new: Value, old: Value, refused_by| Decision {
        case,
        operation,
        resource: "skeinnodes",
        new,
        old,
        refused_by,
    };
    let owned_by = |owners: Value| record("a", &json!({ "ownerReferences": owners }));
    let with_owner = |owner: Value| owned_by(json!([owner]));
    let (unowned, owned) = (record("a", &json!({})), with_owner(owner("a")));
    let mut old_uid = owner("a");
    old_uid["uid"] = "0".into();
    let (mut controller, mut another_kind) = (owner("a"), owner("a"));
    controller["controller"] = true.into();
    another_kind["kind"] = "Pod".into();
    let finalizer = record("a", &json!({ "ownerReferences": [owner("a")], "finalizers": ["x"] }));
    let foreign = owned_by(json!([owner("a"), owner("b")]));
    let event = |component: &str, kind: &str, name: &str| {
        json!({
            "metadata": { "name": "a.skein-x" }, "source": { "component": component },
            "involvedObject": { "kind": kind, "name": name },
        })
    };
    let tell = |case, event, refused_by| Decision {
        resource: "events",
        ..write(case, "CREATE", event, Value::Null, refused_by)
    };
    let null = || Value::Null;
    vec![
        write("created", "CREATE", owned.clone(), null(), &[]),
        write("updated", "UPDATE", owned.clone(), owned.clone(), &[]),
        write("of a Node that came back", "UPDATE", owned.clone(), with_owner(old_uid), &[]),
        write("that had no owner", "UPDATE", owned.clone(), unowned.clone(), &[]),
        write("created without an owner", "CREATE", unowned.clone(), null(), &["owners"]),
        write("without its owner", "UPDATE", unowned.clone(), owned.clone(), &["owners"]),
        write("with no owners", "UPDATE", owned_by(json!([])), owned.clone(), &["owners"]),
        write("still without an owner", "UPDATE", unowned.clone(), unowned, &["owners"]),
        write("owned by a Pod", "CREATE", with_owner(another_kind), null(), &["owners"]),
        write(
            "of another node",
            "UPDATE",
            record("b", &json!({ "ownerReferences": [owner("b")] })),
            record("b", &json!({ "ownerReferences": [owner("b")] })),
            &["own", "owners"],
        ),
        write(
            "owned by another Node",
            "UPDATE",
            with_owner(owner("b")),
            owned.clone(),
            &["owners"],
        ),
        write("with a second owner", "UPDATE", foreign.clone(), owned.clone(), &["owners"]),
        write("controlled", "CREATE", with_owner(controller), null(), &["owners"]),
        write("without another owner", "UPDATE", owned.clone(), foreign, &["owners"]),
        write("with a finalizer", "CREATE", finalizer.clone(), null(), &["metadata"]),
        write("without its finalizer", "UPDATE", owned.clone(), finalizer, &["metadata"]),
        write("deleted", "DELETE", null(), owned, &["operation"]),
        tell("event about the Node", event("skein-agent", "Node", "a"), &[]),
        tell("event about another Node", event("skein-agent", "Node", "b"), &["own"]),
        tell("event about a pod", event("skein-agent", "Pod", "a"), &["events"]),
        tell("event of another component", event("kubelet", "Node", "a"), &["events"]),
    ]
}

/// Evaluates the expressions of the policy as an API server does.
fn check_decisions_of_policy(policy: &Value) -> Result<()> {
    let spec = &policy["spec"];
    let list = |value: &Value| value.as_array().cloned().context("no list");
    let text = |value: &Value| value.as_str().map(str::to_owned).context("no expression");
    let condition = text(&spec["matchConditions"][0]["expression"])?;
    let names = ["own", "operation", "metadata", "owners", "spec", "status", "events"];
    let validations = list(&spec["validations"])?;
    let (count, expected) = (validations.len(), names.len());
    ensure!(count == expected, "The policy has {count} validations instead of {expected}.");
    let mut expressions = vec![("is an agent".to_owned(), condition)];
    for variable in list(&spec["variables"])? {
        expressions.push((text(&variable["name"])?, text(&variable["expression"])?));
    }
    for (name, validation) in names.iter().zip(&validations) {
        expressions.push((format!("may {name}"), text(&validation["expression"])?));
        if let Some(message) = validation["messageExpression"].as_str() {
            expressions.push((format!("message {name}"), message.to_owned()));
        }
    }
    let expressions: Vec<_> = expressions.iter().map(|(name, text)| (&**name, &**text)).collect();
    let agent = "system:serviceaccount:net:skein";
    let on_node = json!({ "authentication.kubernetes.io/node-name": ["a"] });
    let evaluate = |decision: &Decision, user: &str, extra: &Value| {
        let mut info = json!({ "username": user });
        if !extra.is_null() {
            info["extra"] = extra.clone();
        }
        let request = json!({
            "operation": decision.operation, "resource": { "resource": decision.resource },
            "userInfo": info,
        });
        let variables =
            json!({ "request": request, "object": decision.new, "oldObject": decision.old });
        programs::evaluate(&expressions, &variables).with_context(|| decision.case.to_owned())
    };
    for decision in decisions_about_nodes().into_iter().chain(decisions_about_records()) {
        let found = evaluate(&decision, agent, &on_node)?;
        // A deleted object has no new metadata, so one reason is sufficient.
        let refuses = |name: &&&str| {
            found[format!("may {name}")] == false
                && (decision.operation != "DELETE" || **name == "operation")
        };
        let refused_by: Vec<_> = names.iter().filter(refuses).copied().collect();
        ensure!(
            refused_by == decision.refused_by && found["is an agent"] == true,
            "{}: The write is refused by {refused_by:?} instead of {:?}: {found}",
            decision.case,
            decision.refused_by
        );
    }
    let unchanged = &decisions_about_nodes()[0];
    let unbound = evaluate(unchanged, agent, &Value::Null)?;
    ensure!(unbound["may own"] == false, "A token without a node may write: {unbound}");
    let admin = evaluate(unchanged, "admin", &Value::Null)?;
    ensure!(admin["is an agent"] == false, "The policy applies to other users: {admin}");
    Ok(())
}

#[test]
fn token_is_mounted_into_the_agent_only() -> Result<()> {
    let objects = rendered(&[])?;
    let pod = &object(&objects, "DaemonSet", "skein")?["spec"]["template"]["spec"];
    let automount = &pod["automountServiceAccountToken"];
    ensure!(*automount == false, "Every container gets the token: {automount}");
    let place = "/var/run/secrets/kubernetes.io/serviceaccount";
    for (container, expected) in [(&pod["containers"][0], true), (&pod["containers"][1], false)] {
        let mounts = container["volumeMounts"].as_array().context("no mounts")?;
        let has =
            mounts.iter().any(|mount| mount["mountPath"] == place || mount["name"] == "token");
        let name = &container["name"];
        ensure!(has == expected, "{name} has the token: {has}, expected {expected}: {mounts:?}");
    }
    let volumes = pod["volumes"].as_array().context("no volumes")?;
    let tokens: Vec<_> = volumes.iter().filter(|v| !v["projected"].is_null()).collect();
    ensure!(tokens.len() == 1, "The pod does not have exactly one token volume: {tokens:?}");
    let sources = &tokens[0]["projected"]["sources"];
    let token = json!({ "path": "token", "expirationSeconds": 3600 });
    let found = &sources[0]["serviceAccountToken"];
    ensure!(*found == token, "The token is {found} instead of {token}.");
    for (found, path) in [
        (&sources[1]["configMap"]["items"][0]["path"], "ca.crt"),
        (&sources[2]["downwardAPI"]["items"][0]["path"], "namespace"),
    ] {
        ensure!(*found == path, "The volume has the file {found} instead of {path}.");
    }
    Ok(())
}
