//! A real browser: Chromium without a screen, driven over the `WebDriver`
//! protocol. <https://www.w3.org/TR/webdriver2/>

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use reqwest::Method;
use serde_json::{Value, json};

use crate::tools;

/// How a script of this protocol names an element.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";
/// How long a page may take to become as it is waited for, in milliseconds.
const PATIENCE: u64 = 90_000;

/// Whether there is one.
///
/// # Errors
/// How to get it, for the report of what was skipped.
pub fn installed() -> Result<(), &'static str> {
    static FOUND: LazyLock<Result<(), String>> = LazyLock::new(|| {
        for program in ["chromium", "chromedriver"] {
            let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
            if !found.is_ok_and(|status| status.success()) {
                return Err(format!("`{program}` is not installed: apt-get install chromium chromium-driver"));
            }
        }
        Ok(())
    });
    FOUND.as_ref().copied().map_err(String::as_str)
}

/// A window of a browser, killed when dropped.
pub struct Browser {
    driver: Child,
    http: reqwest::Client,
    session: String,
    /// Its profile, and all that it keeps.
    _profile: tempfile::TempDir,
}

impl Browser {
    pub async fn open() -> Self {
        let profile = tempfile::tempdir().expect("a temporary folder");
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            // Whatever the browser leaves behind is to be in there.
            .envs(["HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "TMPDIR"].map(|name| (name, profile.path())))
            // The browser is in it too, and ends with it.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver");
        let mut lines = BufReader::new(driver.stdout.take().expect("a pipe")).lines();
        let port = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let port = line.strip_prefix("ChromeDriver was started successfully on port ")?;
            Some(port.trim_end_matches('.').to_owned())
        });
        // Reads to the end, so that the pipe never fills up.
        std::thread::spawn(move || lines.for_each(drop));
        let http = fileaccess::rotation::probe::Probe::http_client();
        let server = format!("http://127.0.0.1:{}", port.expect("its port"));
        let profile_option = format!("--user-data-dir={}", profile.path().join("profile").display());
        let mut browser = Self { driver, http, session: server + "/session", _profile: profile };
        let arguments = [
            "--headless=new",
            "--window-size=960,840",
            // As root it has no other choice, and it sees nothing but this test's own pages.
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            &profile_option,
        ];
        let chrome = json!({ "binary": program("chromium"), "args": arguments });
        let wanted = json!({ "goog:chromeOptions": chrome, "timeouts": { "script": PATIENCE, "pageLoad": PATIENCE } });
        let opened = browser.send(Method::POST, "", &json!({ "capabilities": { "alwaysMatch": wanted } })).await;
        let id = opened["sessionId"].as_str().expect("a session").to_owned();
        browser.session = format!("{}/{id}", browser.session);
        browser
    }

    /// Ends it in good order, so that it sweeps up after itself.
    pub async fn close(self) {
        self.send(Method::DELETE, "", &Value::Null).await;
    }

    /// One command.
    async fn send(&self, method: Method, path: &str, body: &Value) -> Value {
        let url = format!("{}{path}", self.session);
        let mut request = self.http.request(method.clone(), &url);
        if method == Method::POST {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let answer = request.send().await.expect("an answer").bytes().await.expect("all of it");
        let mut answer: Value = serde_json::from_slice(&answer).expect("JSON");
        assert!(answer["value"]["error"].is_null(), "{path} {body}: {}", answer["value"]);
        answer["value"].take()
    }

    pub async fn go(&self, url: &str) {
        self.send(Method::POST, "/url", &json!({ "url": url })).await;
    }

    /// Runs the body of an `async` function with `arguments`, and gives what it
    /// returns.
    pub async fn run(&self, script: &str, arguments: Value) -> Value {
        let script = format!(
            "const done = arguments[arguments.length - 1];
             (async (...a) => {{ {script} }})(...arguments).then(value => done({{ value }}), e => done({{ e: `${{e}}` }}))"
        );
        let mut ended =
            self.send(Method::POST, "/execute/async", &json!({ "script": script, "args": arguments })).await;
        assert!(ended["e"].is_null(), "{script}: {}", ended["e"]);
        ended["value"].take()
    }

    /// Waits until `expression` is true of the page, and gives its value.
    pub async fn until(&self, expression: &str) -> Value {
        let script = format!(
            "const now = () => {expression};
             return now() || await new Promise(resolve => new MutationObserver(() => now() && resolve(now())).observe(
                 document, {{ attributes: true, characterData: true, childList: true, subtree: true }}))"
        );
        self.run(&script, json!([])).await
    }

    /// The path of an element, by a CSS selector.
    async fn find(&self, selector: &str) -> String {
        let found = json!({ "using": "css selector", "value": selector });
        let found = self.send(Method::POST, "/element", &found).await;
        format!("/element/{}", found[ELEMENT].as_str().expect("an element"))
    }

    pub async fn click(&self, selector: &str) {
        let element = self.find(selector).await;
        self.send(Method::POST, &format!("{element}/click"), &json!({})).await;
    }

    /// Types into an input, or picks a file by its path.
    pub async fn type_into(&self, selector: &str, text: &str) {
        let element = self.find(selector).await;
        self.send(Method::POST, &format!("{element}/value"), &json!({ "text": text })).await;
    }

    /// Clicks on what opens another window, and gives the text that is in there.
    pub async fn text_of_new_window(&self, selector: &str) -> String {
        let own = self.send(Method::GET, "/window", &Value::Null).await;
        self.click(selector).await;
        let handles = self.send(Method::GET, "/window/handles", &Value::Null).await;
        let new = handles.as_array().expect("windows").iter().find(|handle| **handle != own).expect("a new window");
        self.send(Method::POST, "/window", &json!({ "handle": new })).await;
        let text = self.run("return document.body.innerText", json!([])).await;
        self.send(Method::DELETE, "/window", &Value::Null).await;
        self.send(Method::POST, "/window", &json!({ "handle": own })).await;
        text.as_str().expect("text").to_owned()
    }

    /// Keeps a picture of the page under `target/`.
    pub async fn screenshot(&self, name: &str) -> PathBuf {
        let picture = self.send(Method::GET, "/screenshot", &Value::Null).await;
        let picture = BASE64_STANDARD.decode(picture.as_str().expect("a picture")).expect("Base64");
        let folder = tools::target().join("screenshots");
        fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join(name).with_extension("png");
        fs::write(&path, picture).expect("a file");
        path
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The whole group: the browser may still be there if the test has failed.
        let _ = Command::new("kill").args(["-KILL", "--", &format!("-{}", self.driver.id())]).status();
        let _ = self.driver.wait();
    }
}

/// Where a program is.
fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").expect("a path");
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| Path::is_file(file));
    found.expect("it is ignored where there is none")
}
