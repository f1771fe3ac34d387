//! Rotation of the keys of a cluster.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use skein_cluster::skein::{self, agent_pod, wait_until_all_reach_all};
use skein_cluster::{Kube, Options};

use crate::skein::{READY_TIMEOUT, skeinnode};

/// Rotates one key by a command and one because of its age. Before each of two steps, the agents
/// wait for five minutes, after which all nodes have read the record.
#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn rotation_of_keys_loses_no_packet() -> Result<()> {
    skein::with(&Options::default(), &["keyRotation.everyDays=1"], |kube, pods| {
        wait_until_all_reach_all(kube, &pods, Duration::from_secs(10))?;
        let spec =
            |kube: &Kube, name| Ok::<_, anyhow::Error>(skeinnode(kube, name)?["spec"].clone());
        let names = ["node1", "node2"];
        let olds: Vec<Value> = names
            .iter()
            .map(|name| Ok(spec(kube, name)?["publicKey"].clone()))
            .collect::<Result<_>>()?;
        let pings = pods[0].start_pings(kube, pods[1].ips[0], 7400, Duration::from_millis(100))?;
        let start = Instant::now();
        let agent = agent_pod(kube, 0)?;
        let exec = ["--namespace=kube-system", "exec", &agent, "--container=agent", "--"];
        println!("{}", kube.kubectl(&[&exec[..], &["skein-agent", "rotate-key"]].concat())?);
        kube.nodes[1].exec(&["touch", "--date=2 days ago", "/var/lib/skein/node.key"])?;
        // Returns whether the condition holds for the keys of each node.
        let are = |kube: &Kube, keys: &dyn Fn(&Value, &Value) -> bool| -> Result<bool> {
            let mut each = names.iter().zip(&olds);
            each.try_fold(true, |all, (name, old)| Ok(all && keys(&spec(kube, name)?, old)))
        };
        let limit = Duration::from_secs(330);
        kube.wait("the next keys are in the records", READY_TIMEOUT, |kube| {
            are(kube, &|spec, old| spec["publicKey"] == *old && spec["secondPublicKey"].is_string())
        })?;
        println!("the next keys are in the records after {:.0} s", start.elapsed().as_secs_f64());
        kube.wait("the next keys are active", limit, |kube| {
            are(kube, &|spec, old| spec["publicKey"] != *old && spec["secondPublicKey"] == *old)
        })?;
        println!("the next keys are active after {:.0} s", start.elapsed().as_secs_f64());
        kube.wait("the old keys are removed", limit, |kube| {
            are(kube, &|spec, old| spec["publicKey"] != *old && spec["secondPublicKey"].is_null())
        })?;
        println!("the old keys are removed after {:.0} s", start.elapsed().as_secs_f64());
        let (sent, received) = pings.wait_until_sent()?;
        println!("{} of {sent} pings (one per 100 ms) were lost", sent - received);
        // On a busy host, an answer may be late.
        ensure!(sent - received <= 2, "Only {received} of {sent} pings were answered.");
        wait_until_all_reach_all(kube, &pods, Duration::from_secs(10)).map(drop)
    })
}
