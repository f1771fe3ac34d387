//! Probes of a new pod from before its ADD.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_lab::{Netns, Pod};

use crate::support::{attach, detach, ingress_policy, object, put_all, up};

/// Port of the probes.
const PORT: u16 = 7000;
/// Interval between two probes of one sender.
const INTERVAL: Duration = Duration::from_millis(1);
/// Number of pods that are attached one after the other.
const ROUNDS: u8 = 10;

/// Sends datagrams with this content until `ended` is set.
fn probe(
    from: &Pod,
    to: SocketAddr,
    content: u8,
    ended: &Arc<AtomicBool>,
) -> Result<thread::JoinHandle<()>> {
    let socket = from.ns.run(|| UdpSocket::bind("0.0.0.0:0"))??;
    let ended = Arc::clone(ended);
    Ok(thread::spawn(move || {
        while !ended.load(Ordering::Relaxed) {
            // The pod's address has no route yet in the first probes.
            let _ = socket.send_to(&[content], to);
            thread::sleep(INTERVAL);
        }
    }))
}

#[test]
fn no_packet_of_a_new_pod_passes_a_forbidding_policy() -> Result<()> {
    let allowed = "[{from: [{podSelector: {matchLabels: {app: client}}}]}]";
    let web: String = (0..ROUNDS).map(|n| object(&format!("web{n}"), "web", None)).collect();
    let cluster = up(2, &(web.clone() + &ingress_policy(allowed)))?;
    let near = attach(&cluster, 1, "near", Netns::create("near")?, &[])?;
    let far = attach(&cluster, 0, "far", Netns::create("far")?, &[])?;
    let client = attach(&cluster, 0, "client", Netns::create("client")?, &[])?;
    put_all(
        &cluster,
        "objects.yaml",
        &(web + &ingress_policy(allowed) + &object("client", "client", Some(&client))),
    )?;
    for round in 0..ROUNDS {
        let ns = Netns::create("web")?;
        let receiver = ns.run(|| UdpSocket::bind(("0.0.0.0", PORT)))??;
        receiver.set_read_timeout(Some(Duration::from_secs(2)))?;
        let address = format!("10.244.2.{}", 100 + round);
        let to = SocketAddr::new(address.parse()?, PORT);
        let ended = Arc::new(AtomicBool::new(false));
        let probes = [(&near, b'n'), (&far, b'f'), (&client, b'c')]
            .map(|(from, content)| probe(from, to, content, &ended));
        thread::sleep(Duration::from_millis(50));
        let name = format!("web{round}");
        let pod = attach(
            &cluster,
            1,
            &name,
            ns,
            &[&address, &format!("fd00:10:244:2::{}", 100 + round)],
        )?;
        ensure!(pod.v4.to_string() == address, "The pod has {}, not {address}.", pod.v4);
        let mut received = Vec::new();
        let mut buffer = [0; 8];
        for _ in 0..200 {
            let length = receiver.recv(&mut buffer).context("no probe of the allowed client")?;
            received.extend_from_slice(&buffer[..length]);
        }
        ended.store(true, Ordering::Relaxed);
        for probe in probes {
            ensure!(probe?.join().is_ok(), "A sender panicked.");
        }
        let forbidden = received.iter().filter(|content| **content != b'c').count();
        ensure!(forbidden == 0, "{forbidden} forbidden datagrams arrived in round {round}.");
        detach(&cluster, 1, &name)?;
    }
    Ok(())
}
