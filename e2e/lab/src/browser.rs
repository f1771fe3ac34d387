//! A headless Chromium inside a node, controlled by WebDriver (W3C) with Chromium's extensions.

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

/// Address of the driver inside the node.
const DRIVER: &str = "127.0.0.1:9515";
/// Maximum time of one command. The first one starts the browser, which is slow on a busy machine.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
/// Options of Chromium: as root, without a display, and without requests of its own.
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

/// A browser with one window. Dropping the value ends it.
#[derive(Debug)]
pub struct Browser {
    netns: String,
    session: String,
    _driver: Process,
}

impl Browser {
    /// Starts a browser with an empty profile in a namespace.
    ///
    /// # Errors
    /// If chromedriver or Chromium cannot be started.
    pub fn start(lab: &Lab, ns: &Netns) -> Result<Self> {
        let profile = lab.directory().join("chromium");
        fs::create_dir_all(&profile)?;
        let mut command = ns.command("chromedriver");
        // Files that the browser leaves in its home directory are removed with the laboratory.
        command.arg("--port=9515").env("HOME", &profile).env("TMPDIR", &profile);
        let mut driver = Process::start(&mut command, &lab.directory().join("chromedriver.log"))?;
        let ready = || {
            driver.check_alive()?;
            Ok(call(ns.name(), "GET", "/status", None)?["ready"] == true)
        };
        checks::eventually("chromedriver is ready", COMMAND_TIMEOUT, ready)?;
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
        // Discard the log entries and requests of the browser's own first page.
        browser.open("about:blank")?;
        browser.console()?;
        browser.requests()?;
        Ok(browser)
    }

    fn command(&self, what: &str, body: Value) -> Result<Value> {
        call(&self.netns, "POST", &format!("/session/{}/{what}", self.session), Some(body))
            .with_context(|| what.to_owned())
    }

    /// Loads a page and returns when it is completely loaded.
    ///
    /// # Errors
    /// If the page cannot be loaded.
    pub fn open(&self, url: &str) -> Result<()> {
        self.command("url", json!({ "url": url })).map(drop)
    }

    /// Runs the body of a JavaScript function in the page and returns its value.
    ///
    /// # Errors
    /// If the script throws an exception.
    pub fn script(&self, text: &str) -> Result<Value> {
        self.command("execute/sync", json!({ "script": text, "args": [] }))
    }

    /// Returns the rendered text of the first element that a CSS selector matches.
    ///
    /// # Errors
    /// If no element matches.
    pub fn text(&self, selector: &str) -> Result<String> {
        let value =
            self.script(&format!("return document.querySelector({selector:?}).innerText"))?;
        Ok(value.as_str().unwrap_or_default().to_owned())
    }

    /// Types text into an element, after its present text.
    ///
    /// # Errors
    /// If no element matches the CSS selector, or if the element takes no text.
    pub fn keys(&self, selector: &str, text: &str) -> Result<()> {
        self.to_element(selector, "value", json!({ "text": text }))
    }

    /// Clicks on an element.
    ///
    /// # Errors
    /// If no element matches the CSS selector, or if another element covers it.
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

    /// Sends a command of the Chrome DevTools Protocol and returns its result.
    ///
    /// # Errors
    /// If the browser refuses the command.
    pub fn devtools(&self, command: &str, parameters: Value) -> Result<Value> {
        self.command("goog/cdp/execute", json!({ "cmd": command, "params": parameters }))
    }

    /// Sets the width of the window, CSS pixels. Widths below 500 emulate a phone.
    ///
    /// # Errors
    /// If the browser refuses the size.
    pub fn set_width(&self, width: u32) -> Result<()> {
        let phone = width < 500;
        let metrics = json!({
            "width": width, "height": if phone { 812 } else { 1000 }, "deviceScaleFactor": 1, "mobile": phone,
        });
        self.devtools("Emulation.setDeviceMetricsOverride", metrics).map(drop)
    }

    /// Sets the preferred colour scheme, `light` or `dark`.
    ///
    /// # Errors
    /// If the browser does not answer.
    pub fn set_scheme(&self, scheme: &str) -> Result<()> {
        let feature = json!({ "name": "prefers-color-scheme", "value": scheme });
        self.devtools("Emulation.setEmulatedMedia", json!({ "features": [feature] })).map(drop)
    }

    /// Returns the messages of the browser's console since the last call.
    ///
    /// # Errors
    /// If the browser does not answer.
    pub fn console(&self) -> Result<Vec<String>> {
        let entries = self.command("se/log", json!({ "type": "browser" }))?;
        let entries = entries.as_array().context("no console")?;
        Ok(entries.iter().map(|entry| entry["message"].to_string()).collect())
    }

    /// Returns the URLs that the page requested since the last call.
    ///
    /// # Errors
    /// If the browser does not answer.
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

    /// Writes a picture of the whole page to the directory `SKEIN_SCREENSHOTS`. Has no effect if
    /// the variable is not set.
    ///
    /// # Errors
    /// If the picture cannot be taken or written.
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
        // Ends the browser. Processes that remain are killed with the namespace.
        let _ = call(&self.netns, "DELETE", &format!("/session/{}", self.session), None);
    }
}

/// Sends a WebDriver command and returns its value. The error contains the message of the driver.
fn call(netns: &str, method: &str, path: &str, body: Option<Value>) -> Result<Value> {
    let driver: SocketAddr = DRIVER.parse()?;
    let body = body.map(|body| body.to_string());
    let (method, path) = (method.to_owned(), path.to_owned());
    let request = move || http::send(driver, &method, &path, body.as_deref(), COMMAND_TIMEOUT);
    let answer = Netns::run_in(netns, request)??;
    let mut value: Value = serde_json::from_str(&answer.body).context("no JSON")?;
    ensure!(answer.status == 200, "{}: {}", answer.status, value["value"]["message"]);
    Ok(value["value"].take())
}
