//! Policies from files, enforced between the pods of two nodes.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use skein_lab::checks::{EVENT_TIMEOUT, eventually};
use skein_lab::{Family, Netns};

use crate::support::{
    Server, attach, directory, expect, ingress_policy, object, put, put_all, tcp, udp, up,
};

#[test]
fn policy_denies_and_allows_across_nodes() -> Result<()> {
    let pods = object("web", "web", None) + &object("client", "client", None);
    let cluster = up(2, &(pods + &object("other", "other", None)))?;
    let web = attach(&cluster, 1, "web", Netns::create("web")?, &[])?;
    let client = attach(&cluster, 0, "client", Netns::create("client")?, &[])?;
    let other = attach(&cluster, 0, "other", Netns::create("other")?, &[])?;
    let near = attach(&cluster, 1, "near", Netns::create("near")?, &[])?;
    let (_open, _closed) = (Server::start(&web.ns, 80)?, Server::start(&web.ns, 81)?);
    let _back = Server::start(&other.ns, 80)?;
    for from in [&client, &other, &near] {
        expect(from, &web, 80, true)?;
    }
    let pods = object("web", "web", Some(&web)) + &object("client", "client", Some(&client));
    put_all(&cluster, "objects.yaml", &(pods + &object("other", "other", Some(&other))))?;
    put_all(
        &cluster,
        "policy.yaml",
        &ingress_policy(
            "[{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}, {protocol: UDP, port: 80}]}]",
        ),
    )?;
    let address = web.address(Family::V4);
    let is_refused = || Ok(!udp(&other.ns, address, 80)?);
    eventually("the policy takes effect", EVENT_TIMEOUT, is_refused)?;
    eventually("the client is allowed", EVENT_TIMEOUT, || udp(&client.ns, address, 80))?;
    expect(&client, &web, 80, true)?;
    expect(&client, &web, 81, false)?;
    expect(&other, &web, 80, false)?;
    // The pod on the same node has no object: it has no labels.
    expect(&near, &web, 80, false)?;
    // The isolation concerns ingress only, and replies pass.
    expect(&web, &other, 80, true)?;

    put_all(&cluster, "policy.yaml", &ingress_policy("[{ports: [{port: 80}]}]"))?;
    let is_allowed = || Ok(tcp(&other.ns, address, 80)? && !udp(&client.ns, address, 80)?);
    eventually("the changed policy takes effect", EVENT_TIMEOUT, is_allowed)?;
    for agent in &cluster.agents {
        std::fs::remove_file(directory(agent).join("policy.yaml"))?;
    }
    eventually("the removal takes effect", EVENT_TIMEOUT, || udp(&other.ns, address, 80))?;
    expect(&other, &web, 81, true)
}

#[test]
fn open_connection_ends_when_its_policy_is_tightened() -> Result<()> {
    let cluster = up(2, &(object("web", "web", None) + &ingress_policy("[{}]")))?;
    let web = attach(&cluster, 1, "web", Netns::create("web")?, &[])?;
    let client = attach(&cluster, 0, "client", Netns::create("client")?, &[])?;
    let _server = Server::start(&web.ns, 80)?;
    let to = SocketAddr::new(web.address(Family::V4), 80);
    let mut stream =
        client.ns.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(2)))??;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut answer = [0; 5];
    stream.write_all(b"first")?;
    stream.read_exact(&mut answer)?;
    put_all(&cluster, "objects.yaml", &(object("web", "web", None) + &ingress_policy("[]")))?;
    let is_refused = || Ok(!tcp(&client.ns, to.ip(), 80)?);
    eventually("new connections are refused", EVENT_TIMEOUT, is_refused)?;
    stream.write_all(b"other")?;
    ensure!(stream.read_exact(&mut answer).is_err(), "The open connection still carries data.");
    Ok(())
}

#[test]
fn unreadable_file_is_reported_and_changes_nothing_else() -> Result<()> {
    let cluster = up(1, &(object("web", "web", None) + &ingress_policy("[]")))?;
    let web = attach(&cluster, 0, "web", Netns::create("web")?, &[])?;
    let client = attach(&cluster, 0, "client", Netns::create("client")?, &[])?;
    let _server = Server::start(&web.ns, 80)?;
    expect(&client, &web, 80, false)?;
    let agent = &cluster.agents[0];
    // The file loses the name of its policy.
    let broken = object("web", "web", None) + &ingress_policy("[{}]").replace("name: web, ", "");
    put(agent, "objects.yaml", &broken)?;
    let errors = || -> Result<String> { Ok(agent.status()?["policy"]["errors"].to_string()) };
    eventually("the file is reported", EVENT_TIMEOUT, || {
        let errors = errors()?;
        Ok(errors.contains("objects.yaml") && errors.contains("metadata.name"))
    })?;
    expect(&client, &web, 80, false)?;
    // Changes of other files take effect.
    put(
        agent,
        "b.yaml",
        &ingress_policy("[{ports: [{port: 80}, {protocol: UDP, port: 80}]}]")
            .replace("name: web", "name: more"),
    )?;
    let address = web.address(Family::V4);
    eventually("the other file takes effect", EVENT_TIMEOUT, || udp(&client.ns, address, 80))?;
    put(agent, "objects.yaml", &object("web", "web", None))?;
    eventually("the error is gone", EVENT_TIMEOUT, || Ok(errors()? == "[]"))?;
    Ok(())
}
