//! The status page in Chromium: content, layout, contrast, accessibility, and requests.

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

/// Maximum time until the page, which updates every two seconds, shows a change.
const PAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Prepares two nodes whose agents are not started; the first serves its status page.
fn prepared() -> Result<Cluster> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents[0].set("status_page.listen", ADDRESS);
    Ok(cluster)
}

/// Waits until the nodes have a session.
fn reached(cluster: &Cluster) -> Result<()> {
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::wait_until_reached(a, b, Family::V4, PAGE_TIMEOUT).map(drop)
}

/// Starts a browser on the first node, and opens the page.
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

/// Waits until a script in the page returns true.
fn waits(browser: &Browser, what: &str, script: &str) -> Result<Duration> {
    let shown = || -> Result<bool> { Ok(browser.script(script)? == true) };
    checks::eventually(what, PAGE_TIMEOUT, shown)
        .with_context(|| browser.text("main").unwrap_or_default())
}

/// Checks that the console is empty, and that the page sent requests to the agent only.
fn is_clean(browser: &Browser) -> Result<()> {
    let console = browser.console()?;
    ensure!(console.is_empty(), "The console has messages: {console:?}");
    asks_the_agent_only(browser)
}

fn asks_the_agent_only(browser: &Browser) -> Result<()> {
    let asked = browser.requests()?;
    ensure!(asked.len() > 1, "Only these requests were found: {asked:?}");
    let foreign: Vec<_> = asked.iter().filter(|url| !url.starts_with(URL)).collect();
    let first = &foreign[..foreign.len().min(5)];
    ensure!(foreign.is_empty(), "The page sends requests to other servers: {first:?}");
    Ok(())
}

#[test]
fn page_shows_the_values_of_the_status() -> Result<()> {
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
    // Pings to a prefix that no node has.
    node.ns.ip("route add 10.250.0.0/24 dev skein0")?;
    let _ = node.ns.sh("ping -n -c 3 -i 0.1 -W 1 10.250.0.1");
    let status = cluster.agents[0].status()?;
    let report = &status["report"];
    let browser = browser(&cluster)?;
    let text = |selector: &str| browser.text(selector);
    let tile = |name: &str| text(&format!("[data-field='{name}']"));

    let is_shown = |name: &str, expected: &str| -> Result<()> {
        let shown = tile(name)?;
        ensure!(shown == expected, "The page shows {name} {shown} instead of {expected}.");
        Ok(())
    };
    let node_name = text("#node")?;
    ensure!(node_name == status["node"], "The page shows the name {node_name}.");
    ensure!(status["ready"] == true, "The agent is not ready: {status}");
    is_shown("Ready", "yes")?;
    is_shown("Data process", "up")?;
    let number = |name: &str| Ok::<_, anyhow::Error>(tile(name)?.parse::<u64>().ok());
    let mtu = number("Pod MTU")?;
    ensure!(mtu == status["interface"]["mtu"].as_u64(), "The page shows the MTU {mtu:?}.");
    is_shown("Lanes", "2")?;
    let records = number("Node records")?;
    let accepted = status["records"]["accepted"].as_u64();
    ensure!(records == accepted, "The page shows {records:?} records instead of {accepted:?}.");
    is_shown("Connected peers", "1 / 1")?;
    let details = text("#details")?;
    for part in [
        &status["public_key"],
        &status["interface"]["addresses"][0],
        &status["interface"]["local_cidrs"][1],
    ] {
        ensure!(
            details.contains(part.as_str().context("no text")?),
            "The details lack {part}: {details}"
        );
    }
    let is_healthy = text("#verdict-text")?.starts_with("Healthy");
    ensure!(is_healthy, "The page does not show a healthy node: {}", text("#verdict")?);

    let rungs = browser.script(
        "return [...document.querySelectorAll('#offloads tr[data-name]')]
            .map((row) => [row.dataset.name, row.querySelector('.badge').textContent.replace(' ', '_')])",
    )?;
    let wanted: Vec<_> =
        report["capabilities"].as_array().context("no capabilities")?.iter().collect();
    let wanted: Vec<_> = wanted.iter().map(|rung| json!([rung["name"], rung["state"]])).collect();
    ensure!(rungs == json!(wanted), "The page shows the offloads {rungs} instead of {wanted:?}.");

    shows_the_drops(&cluster, &browser)?;
    // The page warns if one percent of the packets is dropped.
    let _ = node.ns.sh("ping -n -q -c 1000 -i 0.002 -W 1 10.250.0.1");
    waits(
        &browser,
        "the drops are noted",
        "return document.getElementById('verdict').dataset.level === 'warn'",
    )?;
    let verdict = text("#verdict")?;
    ensure!(verdict.contains("were dropped"), "The page does not report the drops: {verdict}");

    let row = text("#peer-rows tr[data-name='node-b']")?;
    let peer = &report["peers"][0];
    for part in [&peer["endpoint"], &peer["pod_cidrs"][0], &peer["pod_cidrs"][1], &peer["state"]] {
        ensure!(
            row.contains(part.as_str().context("no text")?),
            "The row of node-b lacks {part}: {row}"
        );
    }
    let pools = text("#pools")?;
    ensure!(text("#pools .pool")?.contains("2 used"), "The page does not show 2 used: {pools}");
    // The page gets neither private keys nor the configuration.
    let served = browser.script("return fetch('api/status').then((answer) => answer.text())")?;
    let served = served.as_str().context("no text")?;
    let private = fs::read_to_string(cluster.lab.directory().join("node-a/node.key"))?;
    let is_leaked = served.contains(private.trim()) || served.contains("private");
    ensure!(!is_leaked, "The answer contains private data: {served}");
    browser.picture("two-nodes")?;
    is_clean(&browser)
}

/// Checks that the page shows exactly the drops of the agent's report.
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
        ensure!(drops.contains_key("egress no_route"), "No drop without a route: {drops:?}");
        Ok(browser.script(shown)? == json!(drops))
    };
    checks::eventually("the page has the drops of the status", PAGE_TIMEOUT, agrees)
        .with_context(|| browser.text("#drops").unwrap_or_default())
        .map(drop)
}

/// Returns the number after a key of a chart; the text has the form `out 12.3k`.
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
fn charts_follow_the_traffic() -> Result<()> {
    let mut cluster = prepared()?;
    cluster.start()?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    reached(&cluster)?;
    let browser = browser(&cluster)?;
    let shows = |chart: &str, key: &str, right: fn(f64) -> bool| {
        let now = || Ok(value(&browser, chart, key).is_ok_and(right));
        checks::eventually(&format!("{chart} {key}"), PAGE_TIMEOUT, now)
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
        checks::eventually("the line moves", PAGE_TIMEOUT, moved)?;
        browser.picture("traffic")?;
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok(())
    })?;
    shows("packets", "out", |rate| rate < 50.0)?;
    // A page that is opened later shows the values of the previous minutes.
    browser.open(URL)?;
    let points = "return (document.querySelector('#chart-packets .line')?.getAttribute('d') ?? '').split('L').length > 5";
    waits(&browser, "the earlier values are drawn", points)?;
    is_clean(&browser)
}

/// Script that returns the texts whose contrast with their background is below 4.5 (WCAG 2.2,
/// 1.4.3), and the number of texts with a sufficient contrast.
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

/// Script that returns the elements that extend beyond the window's right edge.
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
fn page_fits_all_widths_with_sufficient_contrast() -> Result<()> {
    let mut cluster = prepared()?;
    cluster.agents[0].set("offload.tun_uso", false);
    let mut long = Record::synthetic(1)?;
    long.name = format!("a-name-as-clouds-give-them-{}.example", "x".repeat(60));
    cluster.agents[0].put_record(&long)?;
    cluster.start()?;
    let node = &cluster.lab.nodes[0].ns;
    // A peer that does not exist, and a record that is refused.
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
        ensure!(found["width"] == width, "The window is not {width} pixels wide: {found}");
        let fits = found["scroll"] == 0 && found["wide"] == json!([]);
        ensure!(fits, "The page is too wide for {width} pixels: {found}");
        for scheme in ["light", "dark"] {
            browser.set_scheme(scheme)?;
            thread::sleep(Duration::from_millis(100));
            let found = browser.script(CONTRAST)?;
            let bad = &found["bad"];
            ensure!(*bad == json!([]), "{scheme} at {width}: The contrast is too low: {bad:#}");
            ensure!(found["good"].as_u64() > Some(40), "Too few texts were checked: {found}");
            let dark = found["ground"][0].as_u64() < Some(128);
            ensure!(dark == (scheme == "dark"), "The background is not {scheme}: {found}");
            browser.picture(&format!("{scheme}-{width}"))?;
        }
    }
    every_control_has_a_name(&browser)?;
    is_clean(&browser)
}

/// Checks that every control has a name in Chromium's accessibility tree, and that the keyboard
/// reaches the controls.
fn every_control_has_a_name(browser: &Browser) -> Result<()> {
    let tree = browser.devtools("Accessibility.getFullAXTree", json!({}))?;
    let nodes = tree["nodes"].as_array().context("no tree")?;
    let mut controls = 0;
    for node in nodes.iter().filter(|node| node["ignored"] == false) {
        let role = node["role"]["value"].as_str().unwrap_or_default();
        if ["button", "searchbox", "combobox", "image", "heading"].contains(&role) {
            let name = node["name"]["value"].as_str().unwrap_or_default();
            ensure!(!name.is_empty(), "A {role} has no name: {node}");
            controls += 1;
        }
    }
    ensure!(controls > 15, "Only {controls} controls were found.");
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
        ensure!(reached.contains(control), "The keyboard does not reach {control}: {reached:?}");
    }
    Ok(())
}

#[test]
fn thousand_peers_are_searched_and_sorted() -> Result<()> {
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
    ensure!(took < Duration::from_secs(10), "The peers were shown only after {took:?}.");
    let shows = |selector: &str, expected: &str| -> Result<()> {
        let shown = browser.text(selector)?;
        ensure!(shown == expected, "{selector} shows {shown} instead of {expected}.");
        Ok(())
    };
    shows("#peer-count", "1001")?;
    shows("#range", "1 to 50 of 1001")?;
    // Peers with problems are first.
    let first = names()?;
    ensure!(
        first[..3].iter().all(|name| ["fleet-11", "fleet-12", "fleet-13"].contains(&name.as_str())),
        "The unreachable peers are not first: {first:?}"
    );
    let size = browser.script("return document.querySelectorAll('*').length")?;
    ensure!(size.as_u64() < Some(2500), "The page has {size} elements.");
    browser.picture("thousand")?;

    browser.click("#next")?;
    waits(
        &browser,
        "the second page",
        "return document.getElementById('range').textContent === '51 to 100 of 1001'",
    )?;
    ensure!(
        names()?.iter().all(|name| !first.contains(name)),
        "The second page repeats peers of the first."
    );
    browser.keys("#search", "fleet-77")?;
    waits(&browser, "found", &format!("return {rows}.length === 11"))?;
    let found = names()?;
    let are_right = found.iter().all(|name| name.starts_with("fleet-77"));
    ensure!(are_right, "The search for fleet-77 shows {found:?}.");
    shows("#peer-count", "11 of 1001")?;
    browser.click("#peer-head th[data-key=name] button")?;
    browser.click("#peer-head th[data-key=name] button")?;
    waits(&browser, "sorted", &format!("return {rows}[0].dataset.name === 'fleet-779'"))?;
    let order = browser
        .script("return document.querySelector('th[data-key=name]').getAttribute('aria-sort')")?;
    ensure!(order == "descending", "aria-sort is {order} instead of descending.");
    browser.script("document.getElementById('search').value = ''")?;
    browser.keys("#state", "established")?;
    waits(&browser, "the established one", &format!("return {rows}.length === 1"))?;
    let found = names()?;
    ensure!(found == ["node-b"], "The filter shows {found:?} instead of node-b.");

    // The answers that the page requests every two seconds are small.
    for path in ["/api/status", "/api/peers", "/api/peers?limit=100000"] {
        let (node, path) = (node.name(), path.to_owned());
        let answer = Netns::run_in(node, {
            let path = path.clone();
            move || skein_lab::load::http::get(ADDRESS.parse()?, &path)
        })??;
        ensure!(answer.status == 200, "{path} answers with status {}.", answer.status);
        let limit = if path.contains("limit") { 128 << 10 } else { 40 << 10 };
        ensure!(answer.body.len() < limit, "{path} has {} bytes.", answer.body.len());
    }
    is_clean(&browser)
}

#[test]
fn page_shows_a_restart_of_the_agent_and_recovers() -> Result<()> {
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
    let is_reported = verdict.contains("The agent does not answer");
    ensure!(is_reported, "The page does not report the loss: {verdict}");
    browser.picture("restart")?;
    cluster.agents[0].start()?;
    waits(
        &browser,
        "the page is live again",
        "return document.getElementById('live').textContent === 'live'",
    )?;
    let verdict = browser.text("#verdict")?;
    ensure!(
        verdict.contains("Healthy") && verdict.contains("the agent was restarted at"),
        "The page does not report the restart: {verdict}"
    );
    let peers = browser.text("[data-field='Connected peers']")?;
    ensure!(peers == "1 / 1", "The page shows the peers {peers} instead of 1 / 1.");
    // The console has only messages about refused connections.
    let console = browser.console()?;
    let others: Vec<_> = console.iter().filter(|line| !line.contains("net::ERR_")).collect();
    ensure!(others.is_empty(), "The console has other messages: {others:?}");
    asks_the_agent_only(&browser)
}
