//! The status page in a real Chromium: what it shows, how it looks, and what it asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_lab::agent::{Agent, Cluster, Record};
use skein_lab::browser::Browser;
use skein_lab::checks;
use skein_lab::cni::Runtime;
use skein_lab::{Family, Lab, Netns, Plan};

const ADDRESS: &str = "127.0.0.1:9465";
const URL: &str = "http://127.0.0.1:9465/";

/// How long the page may take to show what has happened: it asks every two seconds.
const LIMIT: Duration = Duration::from_secs(30);

/// Two nodes, prepared; the first is to serve its page.
fn prepared() -> Result<Cluster> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents[0].set("status_page.listen", ADDRESS);
    Ok(cluster)
}

/// Waits for the nodes to have a session.
fn reached(cluster: &Cluster) -> Result<()> {
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::wait_until_reached(a, b, Family::V4, LIMIT).map(drop)
}

/// A browser on the first node that shows its page.
fn browser(cluster: &Cluster) -> Result<Browser> {
    let browser = Browser::start(&cluster.lab, &cluster.lab.nodes[0].ns)?;
    browser.open(URL)?;
    waits(
        &browser,
        "the page is live",
        "return document.getElementById('live').dataset.state === 'live'",
    )?;
    Ok(browser)
}

/// Waits until an expression of the page's is true.
fn waits(browser: &Browser, what: &str, script: &str) -> Result<Duration> {
    let shown = || -> Result<bool> { Ok(browser.script(script)? == true) };
    checks::eventually(what, LIMIT, shown).with_context(|| browser.text("main").unwrap_or_default())
}

/// Nothing went wrong inside, and nobody but the agent was asked.
fn is_clean(browser: &Browser) -> Result<()> {
    let console = browser.console()?;
    ensure!(console.is_empty(), "the console has: {console:?}");
    asks_the_agent_only(browser)
}

fn asks_the_agent_only(browser: &Browser) -> Result<()> {
    let asked = browser.requests()?;
    ensure!(asked.len() > 1, "only {asked:?}: is this test still reading them?");
    let elsewhere: Vec<_> = asked.iter().filter(|url| !url.starts_with(URL)).collect();
    ensure!(elsewhere.is_empty(), "it asks elsewhere: {:?}", &elsewhere[..elsewhere.len().min(5)]);
    Ok(())
}

#[test]
fn it_shows_what_the_status_says() -> Result<()> {
    let mut cluster =
        Cluster::prepare(Lab::new(&Plan { pods: 0, ..Plan::default() })?, Family::V4)?;
    cluster.agents[0].set("status_page.listen", ADDRESS);
    cluster.agents.iter_mut().try_for_each(Agent::serve_pods)?;
    cluster.start()?;
    let node = &cluster.lab.nodes[0];
    let runtime = Runtime::new(&cluster.agents[0], node)?;
    let (one, _two) = (runtime.pod("one")?, runtime.pod("two")?);
    let other = Runtime::new(&cluster.agents[1], &cluster.lab.nodes[1])?.pod("other")?;
    checks::transfer(&one, &other, Family::V4, 4 << 20)?;
    // To a prefix that no node has.
    node.ns.ip("route add 10.250.0.0/24 dev skein0")?;
    let _ = node.ns.sh("ping -n -c 3 -i 0.1 -W 1 10.250.0.1");
    let status = cluster.agents[0].status()?;
    let report = &status["report"];
    let browser = browser(&cluster)?;
    let text = |selector: &str| browser.text(selector);
    let tile = |name: &str| text(&format!("[data-field='{name}']"));

    ensure!(text("#node")? == status["node"], "node");
    ensure!(tile("Ready")? == "yes" && status["ready"] == true, "{status}");
    ensure!(tile("Data process")? == "up", "data process");
    let number = |name: &str| Ok::<_, anyhow::Error>(tile(name)?.parse::<u64>().ok());
    ensure!(number("Pod MTU")? == status["interface"]["mtu"].as_u64(), "{status}");
    ensure!(tile("Lanes")? == "2", "lanes");
    ensure!(number("Node records")? == status["records"]["accepted"].as_u64(), "{status}");
    ensure!(tile("Connected peers")? == "1 / 1", "peers");
    let details = text("#details")?;
    for part in [
        &status["public_key"],
        &status["interface"]["addresses"][0],
        &status["interface"]["local_cidrs"][1],
    ] {
        ensure!(details.contains(part.as_str().context("no text")?), "{part} not in {details}");
    }
    ensure!(text("#verdict-text")?.starts_with("Healthy"), "{}", text("#verdict")?);

    let rungs = browser.script(
        "return [...document.querySelectorAll('#offloads tr[data-name]')]
            .map((row) => [row.dataset.name, row.querySelector('.badge').textContent.replace(' ', '_')])",
    )?;
    let wanted: Vec<_> =
        report["capabilities"].as_array().context("no capabilities")?.iter().collect();
    let wanted: Vec<_> = wanted.iter().map(|rung| json!([rung["name"], rung["state"]])).collect();
    ensure!(rungs == json!(wanted), "{rungs} instead of {wanted:?}");

    shows_the_drops(&cluster, &browser)?;
    // A few lost packets are no worry, a hundredth of them is.
    let _ = node.ns.sh("ping -n -q -c 1000 -i 0.002 -W 1 10.250.0.1");
    waits(
        &browser,
        "the drops are noted",
        "return document.getElementById('verdict').dataset.level === 'warn'",
    )?;
    ensure!(text("#verdict")?.contains("were dropped"), "{}", text("#verdict")?);

    let row = text("#peer-rows tr[data-name='node-b']")?;
    let peer = &report["peers"][0];
    for part in [&peer["endpoint"], &peer["pod_cidrs"][0], &peer["pod_cidrs"][1], &peer["state"]] {
        ensure!(row.contains(part.as_str().context("no text")?), "{part} not in {row}");
    }
    ensure!(text("#pools .pool")?.contains("2 used"), "{}", text("#pools")?);
    // Keys that are not public, and the configuration, are not for a browser.
    let served = browser.script("return fetch('api/status').then((answer) => answer.text())")?;
    let served = served.as_str().context("no text")?;
    let private = fs::read_to_string(cluster.lab.directory().join("node-a/node.key"))?;
    ensure!(!served.contains(private.trim()) && !served.contains("private"), "{served}");
    browser.picture("two-nodes")?;
    is_clean(&browser)
}

/// Every drop that there is, and no other.
fn shows_the_drops(cluster: &Cluster, browser: &Browser) -> Result<()> {
    let shown = "return Object.fromEntries([...document.querySelectorAll('#drops tr[data-name]')]
        .map((row) => [row.dataset.name, Number(row.querySelector('[data-packets]').dataset.packets)]))";
    let agrees = || -> Result<bool> {
        let report = cluster.agents[0].report()?;
        let drops = report["drops"].as_array().context("no drops")?.iter();
        let drops: BTreeMap<String, &Value> = drops
            .filter(|drop| drop["packets"] != 0)
            .map(|drop| {
                let text = |key: &str| drop[key].as_str().unwrap_or_default();
                (format!("{} {}", text("direction"), text("reason")), &drop["packets"])
            })
            .collect();
        ensure!(drops.contains_key("egress no_route"), "{drops:?}");
        Ok(browser.script(shown)? == json!(drops))
    };
    checks::eventually("the page has the drops of the status", LIMIT, agrees)
        .with_context(|| browser.text("#drops").unwrap_or_default())
        .map(drop)
}

/// The number behind a key of a chart, as `out 12.3k`.
fn value(browser: &Browser, chart: &str, key: &str) -> Result<f64> {
    let text = browser.text(&format!("#{chart}-{key}"))?;
    let number = text.split_whitespace().nth(1).context("no number")?;
    let (digits, factor) = match number.strip_suffix('k') {
        Some(digits) => (digits, 1000.0),
        None => (number, 1.0),
    };
    Ok(digits.parse::<f64>().with_context(|| text.clone())? * factor)
}

#[test]
fn charts_move_with_traffic() -> Result<()> {
    let mut cluster = prepared()?;
    cluster.start()?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    reached(&cluster)?;
    let browser = browser(&cluster)?;
    let shows = |chart: &str, key: &str, right: fn(f64) -> bool| {
        let now = || Ok(value(&browser, chart, key).is_ok_and(right));
        checks::eventually(&format!("{chart} {key}"), LIMIT, now)
            .with_context(|| browser.text("#charts").unwrap_or_default())
    };
    shows("packets", "out", |rate| rate < 50.0)?;
    thread::scope(|scope| -> Result<()> {
        let time = Duration::from_secs(20);
        let sender = scope.spawn(move || checks::datagrams(a, b, Family::V4, 200, 2000, time));
        shows("packets", "out", |rate| rate > 500.0)?;
        shows("batch", "out", |packets| packets >= 1.0)?;
        let line = "return document.querySelector('#chart-packets .line').getAttribute('d')";
        let before = browser.script(line)?;
        let moved = || Ok(browser.script(line)? != before);
        checks::eventually("the line moves", LIMIT, moved)?;
        browser.picture("traffic")?;
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok(())
    })?;
    shows("packets", "out", |rate| rate < 50.0)?;
    // A page that is opened later has the minutes before.
    browser.open(URL)?;
    let points = "return (document.querySelector('#chart-packets .line')?.getAttribute('d') ?? '').split('L').length > 5";
    waits(&browser, "what was before is drawn", points)?;
    is_clean(&browser)
}

/// Texts whose contrast with what is behind them is below 4.5 (WCAG 2.2, 1.4.3), and how many are
/// enough.
const CONTRAST: &str = r"
const numbers = (colour) => { const n = colour.match(/[\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
const behind = (element) => {
  if (element === null) return numbers(getComputedStyle(document.body).backgroundColor);
  return over(numbers(getComputedStyle(element).backgroundColor), behind(element.parentElement));
};
const light = (colour) => {
  const [r, g, b] = colour.slice(0, 3).map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const bad = [];
let good = 0;
for (const element of document.querySelectorAll('body *')) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim() !== '');
  if (!own || element.disabled || element.closest('noscript') || element.getClientRects().length === 0) continue;
  const style = getComputedStyle(element);
  const ground = behind(element);
  const text = over(numbers(element.tagName === 'text' ? style.fill : style.color), ground);
  const [high, low] = [light(text), light(ground)].sort((a, b) => b - a);
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < 4.5) bad.push(`${element.tagName} ${element.textContent.slice(0, 40)}: ${ratio.toFixed(2)}`);
  else good += 1;
}
return { bad, good, ground: numbers(getComputedStyle(document.body).backgroundColor) };
";

/// What reaches beyond the window's right edge.
const WIDE: &str = r"
const width = document.documentElement.clientWidth;
const hidden = (element) => element.closest('.hidden, thead, noscript') !== null;
return {
  scroll: document.documentElement.scrollWidth - width, width: window.innerWidth,
  wide: [...document.querySelectorAll('body *')].filter((element) => !hidden(element) && element.getBoundingClientRect().right > width + 1)
    .map((element) => element.outerHTML.slice(0, 80)),
};
";

#[test]
fn it_fits_a_phone_and_is_readable_in_the_dark() -> Result<()> {
    let mut cluster = prepared()?;
    cluster.agents[0].set("offload.tun_uso", false);
    let mut long = Record::synthetic(1)?;
    long.name = format!("a-name-as-clouds-give-them-{}.example", "x".repeat(60));
    cluster.agents[0].put_record(&long)?;
    cluster.start()?;
    let node = &cluster.lab.nodes[0].ns;
    // A peer that is not there, and records that are refused.
    node.ip("route add 198.18.0.0/16 via 192.0.2.2")?;
    let _ = node.sh("ping -n -c 8 -i 0.2 -W 1 100.64.1.1");
    fs::write(cluster.agents[0].records_directory().join("wrong.toml"), "name = 7\n")?;
    reached(&cluster)?;
    let browser = browser(&cluster)?;
    waits(
        &browser,
        "refused",
        "return document.getElementById('verdict').dataset.level === 'warn'",
    )?;
    for width in [375, 320, 768, 1200] {
        browser.set_width(width)?;
        thread::sleep(Duration::from_millis(300));
        let found = browser.script(WIDE)?;
        ensure!(found["width"] == width, "{found}");
        ensure!(found["scroll"] == 0 && found["wide"] == json!([]), "at {width}: {found}");
        for scheme in ["light", "dark"] {
            browser.set_scheme(scheme)?;
            thread::sleep(Duration::from_millis(100));
            let found = browser.script(CONTRAST)?;
            ensure!(found["bad"] == json!([]), "{scheme} at {width}: {:#}", found["bad"]);
            ensure!(found["good"].as_u64() > Some(40), "only {found} texts were looked at");
            let dark = found["ground"][0].as_u64() < Some(128);
            ensure!(dark == (scheme == "dark"), "{scheme}: {found}");
            browser.picture(&format!("{scheme}-{width}"))?;
        }
    }
    every_control_has_a_name(&browser)?;
    is_clean(&browser)
}

/// By Chromium's own accessibility tree; and the keyboard reaches each.
fn every_control_has_a_name(browser: &Browser) -> Result<()> {
    let tree = browser.devtools("Accessibility.getFullAXTree", json!({}))?;
    let nodes = tree["nodes"].as_array().context("no tree")?;
    let mut controls = 0;
    for node in nodes.iter().filter(|node| node["ignored"] == false) {
        let role = node["role"]["value"].as_str().unwrap_or_default();
        if ["button", "searchbox", "combobox", "image", "heading"].contains(&role) {
            let name = node["name"]["value"].as_str().unwrap_or_default();
            ensure!(!name.is_empty(), "a {role} without a name: {node}");
            controls += 1;
        }
    }
    ensure!(controls > 15, "only {controls} controls: is this test still reading them?");
    let mut reached = BTreeSet::new();
    for _ in 0..15 {
        for kind in ["rawKeyDown", "keyUp"] {
            let key =
                json!({ "type": kind, "key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9 });
            browser.devtools("Input.dispatchKeyEvent", key)?;
        }
        let focus = browser
            .script("return document.activeElement.id || document.activeElement.textContent")?;
        reached.insert(focus.as_str().unwrap_or_default().to_owned());
    }
    for control in ["search", "state", "Peer", "State", "RTT", "Path MTU"] {
        ensure!(reached.contains(control), "{control} is not reached by the keyboard: {reached:?}");
    }
    Ok(())
}

#[test]
fn a_thousand_peers_are_found_and_sorted() -> Result<()> {
    let mut cluster = prepared()?;
    let fleet = (0..1000).map(Record::synthetic).collect::<Result<Vec<_>>>()?;
    let file = cluster.agents[0].records_directory().join("fleet.toml");
    fs::write(file, Record::all_to_toml(&fleet))?;
    cluster.start()?;
    let node = &cluster.lab.nodes[0].ns;
    node.ip("route add 198.18.0.0/16 via 192.0.2.2")?;
    for number in [11, 12, 13] {
        let _ = node.sh(&format!("ping -n -c 2 -i 0.2 -W 1 100.64.{number}.1"));
    }
    reached(&cluster)?;
    let browser = browser(&cluster)?;
    let rows = "document.querySelectorAll('#peer-rows tr[data-name]')";
    let names = || -> Result<Vec<String>> {
        let names =
            browser.script(&format!("return [...{rows}].map((row) => row.dataset.name)"))?;
        Ok(serde_json::from_value(names)?)
    };

    let start = Instant::now();
    browser.open(URL)?;
    waits(&browser, "the first page", &format!("return {rows}.length === 50"))?;
    let took = start.elapsed();
    ensure!(took < Duration::from_secs(10), "{took:?} until the peers were shown");
    ensure!(browser.text("#peer-count")? == "1001", "{}", browser.text("#peer-count")?);
    ensure!(browser.text("#range")? == "1 to 50 of 1001", "{}", browser.text("#range")?);
    // What needs attention is first.
    let first = names()?;
    ensure!(
        first[..3].iter().all(|name| ["fleet-11", "fleet-12", "fleet-13"].contains(&name.as_str())),
        "{first:?}"
    );
    let size = browser.script("return document.querySelectorAll('*').length")?;
    ensure!(size.as_u64() < Some(2500), "{size} elements");
    browser.picture("thousand")?;

    browser.click("#next")?;
    waits(
        &browser,
        "the second page",
        "return document.getElementById('range').textContent === '51 to 100 of 1001'",
    )?;
    ensure!(names()?.iter().all(|name| !first.contains(name)), "peers are there twice");
    browser.keys("#search", "fleet-77")?;
    waits(&browser, "found", &format!("return {rows}.length === 11"))?;
    ensure!(names()?.iter().all(|name| name.starts_with("fleet-77")), "{:?}", names()?);
    ensure!(browser.text("#peer-count")? == "11 of 1001", "{}", browser.text("#peer-count")?);
    browser.click("#peer-head th[data-key=name] button")?;
    browser.click("#peer-head th[data-key=name] button")?;
    waits(&browser, "sorted", &format!("return {rows}[0].dataset.name === 'fleet-779'"))?;
    let order = browser
        .script("return document.querySelector('th[data-key=name]').getAttribute('aria-sort')")?;
    ensure!(order == "descending", "{order}");
    browser.script("document.getElementById('search').value = ''")?;
    browser.keys("#state", "established")?;
    waits(&browser, "the established one", &format!("return {rows}.length === 1"))?;
    ensure!(names()? == ["node-b"], "{:?}", names()?);

    // What is asked every two seconds stays small.
    for path in ["/api/status", "/api/peers", "/api/peers?limit=100000"] {
        let (node, path) = (node.name(), path.to_owned());
        let answer = Netns::run_in(node, {
            let path = path.clone();
            move || skein_lab::load::http::get(ADDRESS.parse()?, &path)
        })??;
        ensure!(answer.status == 200, "{path}: {}", answer.status);
        let limit = if path.contains("limit") { 128 << 10 } else { 40 << 10 };
        ensure!(answer.body.len() < limit, "{path} has {} bytes", answer.body.len());
    }
    is_clean(&browser)
}

#[test]
fn a_restart_of_the_agent_is_shown_and_recovered_from() -> Result<()> {
    let mut cluster = prepared()?;
    cluster.start()?;
    reached(&cluster)?;
    let browser = browser(&cluster)?;
    is_clean(&browser)?;
    cluster.agents[0].kill_control();
    waits(
        &browser,
        "the loss is shown",
        "return document.getElementById('live').textContent === 'no answer'",
    )?;
    let verdict = browser.text("#verdict")?;
    ensure!(verdict.contains("The agent does not answer"), "{verdict}");
    browser.picture("restart")?;
    cluster.agents[0].start()?;
    waits(
        &browser,
        "it is live again",
        "return document.getElementById('live').textContent === 'live'",
    )?;
    let verdict = browser.text("#verdict")?;
    ensure!(
        verdict.contains("Healthy") && verdict.contains("the agent was restarted at"),
        "{verdict}"
    );
    ensure!(browser.text("[data-field='Connected peers']")? == "1 / 1");
    // Refused connections are the only complaint.
    let console = browser.console()?;
    let others: Vec<_> = console.iter().filter(|line| !line.contains("net::ERR_")).collect();
    ensure!(others.is_empty(), "the console has: {others:?}");
    asks_the_agent_only(&browser)
}
