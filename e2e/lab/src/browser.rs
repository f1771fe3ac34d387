//! A headless Chromium inside a node, commanded by the WebDriver protocol (W3C) and Chromium's own
//! additions to it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::process::Process;
use super::{Lab, Netns};
use crate::checks;
use crate::load::http;

/// Where the driver listens, inside the node.
const DRIVER: &str = "127.0.0.1:9515";
/// How long one command may take: the first starts the browser, on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
/// As root, without a display, and asking nobody for anything of its own.
const FLAGS: [&str; 9] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1000",
];

/// A browser with one window; it ends when dropped.
#[derive(Debug)]
pub struct Browser {
    netns: String,
    session: String,
    _driver: Process,
}

impl Browser {
    /// Starts one in that namespace, with an empty profile.
    pub fn start(lab: &Lab, ns: &Netns) -> Result<Self> {
        let profile = lab.directory().join("chromium");
        fs::create_dir_all(&profile)?;
        let mut command = ns.command("chromedriver");
        // What a browser leaves in a home directory is gone with the laboratory, too.
        command.arg("--port=9515").env("HOME", &profile).env("TMPDIR", &profile);
        let mut driver = Process::start(&mut command, &lab.directory().join("chromedriver.log"))?;
        let ready = || {
            driver.check_alive()?;
            Ok(call(ns.name(), "GET", "/status", None)?["ready"] == true)
        };
        checks::eventually("chromedriver is ready", LIMIT, ready)?;
        let mut flags: Vec<String> = FLAGS.map(str::to_owned).into();
        flags.push(format!("--user-data-dir={}", profile.join("profile").display()));
        let capabilities = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": { "binary": "/usr/bin/chromium", "args": flags },
            "goog:loggingPrefs": { "browser": "ALL", "performance": "ALL" },
        } } });
        let session = call(ns.name(), "POST", "/session", Some(capabilities))
            .with_context(|| driver.log_tail(20))?;
        let session = session["sessionId"].as_str().context("no session")?.to_owned();
        let browser = Self { netns: ns.name().to_owned(), session, _driver: driver };
        // Its own first page, and what that asks for, is nobody's concern.
        browser.open("about:blank")?;
        browser.console()?;
        browser.requests()?;
        Ok(browser)
    }

    fn command(&self, what: &str, body: Value) -> Result<Value> {
        call(&self.netns, "POST", &format!("/session/{}/{what}", self.session), Some(body))
            .with_context(|| what.to_owned())
    }

    /// Loads a page; returns when all of it is there.
    pub fn open(&self, url: &str) -> Result<()> {
        self.command("url", json!({ "url": url })).map(drop)
    }

    /// The value of a function's body (JavaScript) inside the page.
    pub fn script(&self, text: &str) -> Result<Value> {
        self.command("execute/sync", json!({ "script": text, "args": [] }))
    }

    /// The text of the first element that a selector finds, as it is rendered.
    pub fn text(&self, selector: &str) -> Result<String> {
        let value =
            self.script(&format!("return document.querySelector({selector:?}).innerText"))?;
        Ok(value.as_str().unwrap_or_default().to_owned())
    }

    /// Types into an element, after what is there.
    pub fn keys(&self, selector: &str, text: &str) -> Result<()> {
        self.to_element(selector, "value", json!({ "text": text }))
    }

    /// Clicks on an element.
    pub fn click(&self, selector: &str) -> Result<()> {
        self.to_element(selector, "click", json!({}))
    }

    fn to_element(&self, selector: &str, what: &str, body: Value) -> Result<()> {
        let query = json!({ "using": "css selector", "value": selector });
        let found = self.command("element", query).with_context(|| selector.to_owned())?;
        let id = found.as_object().and_then(|found| found.values().next());
        let id = id.and_then(Value::as_str).context("no element")?;
        self.command(&format!("element/{id}/{what}"), body).map(drop)
    }

    /// A command of Chromium's own protocol (DevTools).
    pub fn devtools(&self, command: &str, parameters: Value) -> Result<Value> {
        self.command("goog/cdp/execute", json!({ "cmd": command, "params": parameters }))
    }

    /// Makes the window that of a phone or of a desk, `width` CSS pixels wide.
    pub fn set_width(&self, width: u32) -> Result<()> {
        let phone = width < 500;
        let metrics = json!({
            "width": width, "height": if phone { 812 } else { 1000 }, "deviceScaleFactor": 1, "mobile": phone,
        });
        self.devtools("Emulation.setDeviceMetricsOverride", metrics).map(drop)
    }

    /// What the page is told that its reader prefers: `light` or `dark`.
    pub fn set_scheme(&self, scheme: &str) -> Result<()> {
        let feature = json!({ "name": "prefers-color-scheme", "value": scheme });
        self.devtools("Emulation.setEmulatedMedia", json!({ "features": [feature] })).map(drop)
    }

    /// What the console has got since the last call.
    pub fn console(&self) -> Result<Vec<String>> {
        let entries = self.command("se/log", json!({ "type": "browser" }))?;
        let entries = entries.as_array().context("no console")?;
        Ok(entries.iter().map(|entry| entry["message"].to_string()).collect())
    }

    /// Addresses that the page has asked for since the last call.
    pub fn requests(&self) -> Result<Vec<String>> {
        let entries = self.command("se/log", json!({ "type": "performance" }))?;
        let url = |entry: &Value| {
            let event: Value = serde_json::from_str(entry["message"].as_str()?).ok()?;
            let sent = event["message"]["method"] == "Network.requestWillBeSent";
            let url = event["message"]["params"]["request"]["url"].as_str();
            sent.then(|| url.map(str::to_owned)).flatten()
        };
        Ok(entries.as_array().context("no log")?.iter().filter_map(url).collect())
    }

    /// A picture of the whole page, where `SKEIN_SCREENSHOTS` names a directory for it.
    pub fn picture(&self, name: &str) -> Result<()> {
        let Some(directory) = std::env::var_os("SKEIN_SCREENSHOTS") else { return Ok(()) };
        let whole = json!({ "captureBeyondViewport": true });
        let picture = self.devtools("Page.captureScreenshot", whole)?;
        let picture = BASE64.decode(picture["data"].as_str().context("no picture")?)?;
        let path: PathBuf = Path::new(&directory).join(format!("{name}.png"));
        fs::create_dir_all(&directory)?;
        fs::write(&path, picture).with_context(|| path.display().to_string())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ends the browser; what is left of it goes with the namespace.
        let _ = call(&self.netns, "DELETE", &format!("/session/{}", self.session), None);
    }
}

/// A command of the protocol; its value, or an error with what the driver says.
fn call(netns: &str, method: &str, path: &str, body: Option<Value>) -> Result<Value> {
    let driver: SocketAddr = DRIVER.parse()?;
    let body = body.map(|body| body.to_string());
    let (method, path) = (method.to_owned(), path.to_owned());
    let ask = move || http::send(driver, &method, &path, body.as_deref(), LIMIT);
    let answer = Netns::run_in(netns, ask)??;
    let mut value: Value = serde_json::from_str(&answer.body).context("no JSON")?;
    ensure!(answer.status == 200, "{}: {}", answer.status, value["value"]["message"]);
    Ok(value["value"].take())
}
