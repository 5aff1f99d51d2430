//! The page of `fileaccess dev`, and what it takes to be let in: by the API
//! behind it, by the embedded S3, and by a bucket with CORS rules.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use aws_credential_types::Credentials;
use aws_sdk_s3::types::{CorsConfiguration, CorsRule};
use fileaccess::config::Listen;
use fileaccess::dev::{self, Dev, Options};
use fileaccess::pb;
use fileaccess::pb::file_access_client::FileAccessClient;
use fileaccess::rotation::probe::Probe;
use fileaccess::store::cors::{EXPOSED, METHODS};
use prost::Message as _;
use reqwest::Method;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::sync::oneshot;
use tonic::transport::{Channel, Endpoint};

use crate::binary::{Running, fileaccess};
use crate::revoke::managed;
use crate::service::output;
use crate::stage::{self, Backend, Stage, ask, download};
use crate::webdriver::Browser;
use crate::{Case, cases};

/// Those that take a browser, on either S3.
pub fn browser_cases() -> Vec<Case> {
    cases![a_file_goes_in_and_out_and_its_link_dies, what_is_cancelled_leaves_nothing]
}

/// Those that take a browser, on the embedded S3.
pub fn page_cases() -> Vec<Case> {
    cases![
        the_page_speaks_protocol_buffers,
        a_part_is_tried_again_and_an_upload_that_fails_is_given_up,
        other_bytes_than_those_of_the_file_are_refused,
    ]
}

pub fn cases() -> Vec<Case> {
    cases![
        dev_prints_where_its_page_is_and_serves_it_on_loopback_only,
        the_page_answers_nobody_else,
        the_embedded_s3_lets_the_page_in_and_nobody_else,
    ]
}

pub fn localstack_cases() -> Vec<Case> {
    cases![bootstrap_lets_pages_in_and_keeps_other_rules]
}

/// The page, served for some S3.
struct Scene {
    /// Its origin.
    page: String,
    /// The bucket, as callers name it.
    bucket: &'static str,
    api: FileAccessClient<Channel>,
    http: reqwest::Client,
    s3: String,
    /// The service's own key.
    key: Credentials,
    /// On LocalStack.
    stage: Option<Stage>,
    _end: oneshot::Sender<()>,
}

impl Scene {
    async fn new(backend: Backend) -> Self {
        let (end, ended) = oneshot::channel::<()>();
        let until = async {
            let _ = ended.await;
        };
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        if backend == Backend::Embedded {
            let options = Options { data: None, listen: Listen::Tcp(any), s3_listen: any, web_listen: any };
            let Ok(dev) = Dev::start(&options).await else { panic!("no dev") };
            let channel = Endpoint::from_shared(format!("http://{}", dev.address)).unwrap().connect_lazy();
            let (page, s3, key) = (dev.web.clone(), dev.s3.clone(), dev.identity.clone());
            tokio::spawn(dev.serve(until));
            let (api, http) = (FileAccessClient::new(channel), Probe::http_client());
            return Self { page, bucket: dev::BUCKET, api, http, s3, key, stage: None, _end: end };
        }
        let stage = Stage::with(backend, &managed(""), None).await;
        let listener = TcpListener::bind(any).await.unwrap();
        let [page, _] = dev::web::origins(listener.local_addr().unwrap());
        tokio::spawn(dev::web::serve(listener, Arc::clone(&stage.app), until));
        let (api, http, s3) = (stage.api.clone(), stage.http.clone(), stage.endpoint.clone());
        let key = Credentials::new("test", "test", None, None, "test");
        Self { page, bucket: "files", api, http, s3, key, stage: Some(stage), _end: end }
    }

    /// Has a bucket of its own take the page's requests. The embedded S3 does.
    async fn let_in(&self) {
        let Some(stage) = &self.stage else { return };
        let folder = tempfile::tempdir().unwrap();
        output(bootstrap(folder.path(), stage, &["--cors", &self.page])).await.unwrap();
    }

    /// How many uploads S3 has open.
    async fn open(&self) -> usize {
        let bucket = self.stage.as_ref().map_or(self.bucket, |stage| &stage.bucket);
        let list = stage::s3(&self.s3, self.key.clone()).list_multipart_uploads().bucket(bucket).send();
        list.await.unwrap().uploads().len()
    }

    async fn stat(&self, key: &str) -> Result<pb::StatResponse, tonic::Status> {
        let request = pb::StatRequest { bucket: self.bucket.into(), key: key.into(), version_id: None };
        self.api.clone().stat(request).await.map(tonic::Response::into_inner)
    }

    async fn presigned(&self, key: &str) -> String {
        let request = pb::PresignRequest { bucket: self.bucket.into(), ..ask(key, download()) };
        let presigned = async {
            loop {
                match self.api.clone().presign(request.clone()).await {
                    // On a busy machine a lease may run out, until the vault is read again.
                    Err(status) if status.code() == tonic::Code::Unavailable => {}
                    presigned => return presigned.unwrap().into_inner().url,
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(30), presigned).await.expect("a usable key")
    }

    async fn stored(&self, key: &str) -> (String, Vec<u8>) {
        let answer = self.http.get(self.presigned(key).await).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{key}");
        let kind = answer.headers()["content-type"].to_str().unwrap().to_owned();
        (kind, answer.bytes().await.unwrap().to_vec())
    }
}

/// What `fileaccess bootstrap` is told of a bucket.
fn bootstrap(folder: &Path, stage: &Stage, arguments: &[&str]) -> Command {
    let file = folder.join("settings.toml");
    let key = "environment = { access_key_id = 'IT_ID', secret_access_key = 'IT_SECRET' }";
    let text = format!(
        "identity = {{ {key} }}\n[buckets.files]\nbucket = '{}'\nregion = 'us-east-1'\nendpoint = '{}'\n\
         path_style = true\n[signers.main]\nkind = 'ambient'\n[[routes]]\nbucket = 'files'\nsigner = 'main'\n",
        stage.bucket, stage.endpoint
    );
    std::fs::write(&file, text).unwrap();
    let mut command = fileaccess(&["bootstrap", "--config", file.to_str().unwrap()]);
    command.args(arguments).env("IT_ID", "test").env("IT_SECRET", "test");
    command
}

const RECIPE: &str = "be generous with the paprika";

/// Drops a file of a name and a content, or of a size, on the page.
const DROP: &str = "const files = new DataTransfer();
    const content = typeof a[1] === 'number' ? new Uint8Array(a[1]) : a[1];
    files.items.add(new File([content], a[0], { type: 'text/plain' }));
    document.getElementById('drop').dispatchEvent(new DragEvent('drop', { dataTransfer: files }))";

fn sha256(bytes: &[u8]) -> pb::Checksum {
    pb::Checksum { value: Some(pb::checksum::Value::Sha256(Sha256::digest(bytes).to_vec())) }
}

async fn a_file_goes_in_and_out_and_its_link_dies(backend: Backend) {
    let scene = Scene::new(backend).await;
    let browser = Browser::open().await;
    browser.go(&format!("{}/?bucket={}", scene.page, scene.bucket)).await;
    browser.until("document.getElementById('listing').textContent == 'Nothing is stored here.'").await;
    browser.type_into("[name=prefix]", "tenant/").await;
    let recipe = "li[data-key='tenant/recipe.txt']";
    let state = |of: &str, state: &str| format!("document.querySelector(\"{of}[data-state={state}]\")?.innerText");
    let uploaded = async |name: &str| {
        let row = format!("#uploads li[data-key='tenant/{name}']");
        let ended = format!("document.querySelector(\"{row}:is([data-state=done], [data-state=failed])\")");
        let script = format!("{ended} && [{ended}.dataset.state, {ended}.innerText]");
        let ended = browser.until(&script).await;
        (ended[0] == "done", ended[1].as_str().unwrap().to_owned())
    };

    if scene.stage.is_some() {
        // Without a rule of the bucket, the browser keeps the page out.
        browser.run(DROP, json!(["recipe.txt", RECIPE])).await;
        let (done, said) = uploaded("recipe.txt").await;
        assert!(!done && said.contains("CORS"), "{said}");
        scene.let_in().await;
    }
    browser.run(DROP, json!(["recipe.txt", RECIPE])).await;
    browser.until(&state(&format!("#uploads {recipe}"), "done")).await;
    assert_eq!(scene.stored("tenant/recipe.txt").await, ("text/plain".into(), RECIPE.into()));
    let facts = scene.stat("tenant/recipe.txt").await.unwrap();
    assert_eq!(facts.checksum, Some(sha256(RECIPE.as_bytes())), "it was sent with its checksum");

    // By a form, and in parts; picked rather than dropped.
    let folder = tempfile::tempdir().unwrap();
    let menu = folder.path().join("menu.txt");
    std::fs::write(&menu, "Goulash.").unwrap();
    browser.click("[value=form]").await;
    browser.type_into("#files", menu.to_str().unwrap()).await;
    let (done, said) = uploaded("menu.txt").await;
    assert!(done, "{said}");
    assert_eq!(scene.stored("tenant/menu.txt").await, ("text/plain".into(), "Goulash.".into()));

    let film = folder.path().join("film.mp4");
    let path = film.clone();
    // Off this thread, which serves the page too.
    let write = tokio::task::spawn_blocking(move || {
        let bytes: Vec<u8> = (0..64_u32 << 20).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
        std::fs::write(path, &bytes).map(|()| bytes)
    });
    let bytes = write.await.unwrap().unwrap();
    browser.click("[value=multipart]").await;
    let watch = "window.seen = new Set();
        new MutationObserver(() => seen.add(document.querySelector('#uploads li progress').value))
            .observe(document.getElementById('uploads'), { attributes: true, subtree: true })";
    browser.run(watch, json!([])).await;
    browser.type_into("#files", film.to_str().unwrap()).await;
    let (done, said) = uploaded("film.mp4").await;
    assert!(done, "{said}");
    let seen = browser.run("return [...seen].filter(bytes => 0 < bytes && bytes < 64 * 2 ** 20)", json!([])).await;
    assert!(seen.as_array().unwrap().len() >= 4, "progress was {seen}");
    let (kind, stored) = scene.stored("tenant/film.mp4").await;
    assert!(kind == "video/mp4" && stored == bytes, "{kind}, {} bytes", stored.len());
    let etag = scene.stat("tenant/film.mp4").await.unwrap().etag;
    assert!(etag.trim_end_matches('"').rsplit_once('-').is_some_and(|(_, parts)| parts != "1"), "{etag}");

    // A link, which is opened, and dies.
    let listed = "tr[data-key='tenant/recipe.txt']";
    browser.until(&format!("document.querySelector(\"{listed} button\")")).await;
    browser.click(&format!("{listed} button")).await;
    let link = format!("#links {recipe}");
    browser.until(&state(&link, "live")).await;
    assert_eq!(browser.text_of_new_window(&format!("{link} a")).await, RECIPE);
    let url = browser.run(&format!("return document.querySelector(\"{link} a\").href"), json!([])).await;
    let url = url.as_str().unwrap();
    assert_eq!(scene.http.get(url).send().await.unwrap().status(), 200);
    browser.click(&format!("{link} button:last-child")).await;
    let said = browser.until(&state(&link, "dead")).await;
    assert!(said.as_str().unwrap().contains("S3 answers 403"), "{said}");
    assert_eq!(scene.http.get(url).send().await.unwrap().status(), 403);
    // There are new ones at once.
    browser.click(&format!("{listed} button")).await;
    browser.until(&state(&link, "live")).await;
    browser.screenshot(&format!("page-{backend:?}").to_lowercase()).await;
    browser.close().await;
}

async fn the_page_speaks_protocol_buffers(_: Backend) {
    let scene = Scene::new(Backend::Embedded).await;
    let browser = Browser::open().await;
    browser.go(&scene.page).await;
    let upload = pb::Upload { content_type: Some("a/b".into()), content_length: Some(0), ..pb::Upload::default() };
    let start = pb::StartUploadRequest {
        bucket: "files".into(),
        key: "é🦀".into(),
        size: 5 << 40,
        upload: Some(upload),
        checksum_algorithm: pb::ChecksumAlgorithm::Sha256.into(),
        ..pb::StartUploadRequest::default()
    };
    let script = "return [...encode('StartUploadRequest', a[0])]";
    let upload = json!({ "content_type": "a/b", "content_length": 0 });
    let algorithm = browser.run("return SHA256", json!([])).await;
    let asked = json!({ "bucket": "files", "key": "é🦀", "size": 5_u64 << 40, "upload": upload,
        "checksum_algorithm": algorithm });
    let bytes: Vec<u8> = serde_json::from_value(browser.run(script, json!([asked])).await).unwrap();
    assert_eq!(pb::StartUploadRequest::decode(&bytes[..]).unwrap(), start);
    let parts = (1..=300).map(|part_number| pb::PartRequest { part_number, checksum: Some(sha256(b"")) }).collect();
    let sign = pb::SignPartsRequest { upload_token: "t".repeat(200), parts, ttl: None };
    let script = "const checksum = { sha256: await sha256(new Uint8Array(0)) };
                  const parts = Array.from({ length: 300 }, (_, n) => ({ part_number: n + 1, checksum }));
                  return [...encode('SignPartsRequest', { upload_token: 't'.repeat(200), parts })]";
    let bytes: Vec<u8> = serde_json::from_value(browser.run(script, json!([])).await).unwrap();
    assert_eq!(pb::SignPartsRequest::decode(&bytes[..]).unwrap(), sign);

    // With fields that the page does not know.
    let entry = pb::ObjectEntry {
        key: "é🦀".into(),
        size: 5 << 40,
        etag: "\"e\"".into(),
        last_modified: Some(prost_types::Timestamp { seconds: 1_795_527_600, nanos: 5 }),
        ..pb::ObjectEntry::default()
    };
    let common_prefixes = vec!["a/".into()];
    let page = pb::ListResponse { objects: vec![entry; 2], common_prefixes, next_page_token: "next".into() };
    let told = browser.run("return decode('ListResponse', Uint8Array.from(a[0]))", json!([page.encode_to_vec()])).await;
    let entry = json!({ "key": "é🦀", "size": 5_u64 << 40, "last_modified": { "seconds": 1_795_527_600 } });
    assert_eq!(told, json!({ "objects": [entry, entry], "next_page_token": "next" }));
    for cut in ["0x0a", "0x0a, 0x80", "0x0a, 2, 0x0a"] {
        let script =
            format!("try {{ decode('ListResponse', Uint8Array.of({cut})) }} catch (error) {{ return error.message }}");
        assert_eq!(browser.run(&script, json!([])).await, "the answer is cut off");
    }
    browser.close().await;
}

async fn a_part_is_tried_again_and_an_upload_that_fails_is_given_up(_: Backend) {
    let scene = Scene::new(Backend::Embedded).await;
    let browser = Browser::open().await;
    browser.go(&scene.page).await;
    let script = "const [own, ask, askOnce] = [send, call, callOnce], urls = [], cancelled = new AbortController();
        let token, completions = 0;
        // A completion that takes longer than a call may.
        window.callOnce = (method, ...rest) =>
            method === 'CompleteUpload' && ++completions === 1 ? { status: '4' } : askOnce(method, ...rest);
        window.call = async (method, ...rest) => {
            const answer = await ask(method, ...rest);
            if (method === 'StartUpload') {
                token = answer.upload_token;
                // As if the answer were on its way still.
                if (a[1]) cancelled.abort(new Error('cancelled'));
            }
            return answer;
        };
        // What comes of the network: each first try is lost, or every one.
        window.send = (...sent) => {
            urls.push(sent[1]);
            return urls.length > a[0] ? own(...sent) : Promise.reject(new Error('lost'));
        };
        const file = new File([new Uint8Array(6 << 20)], 'zeros');
        const how = { progress() {}, finishing() {}, signal: cancelled.signal };
        const error = await multipart(file, 'demo', 'zeros', how).then(() => null, error => error.message);
        return [token, error, urls.length, new Set(urls).size, completions]";
    let done = browser.run(script, json!([2, false])).await;
    assert_eq!((&done[1], &done[2], &done[3]), (&json!(null), &json!(3), &json!(3)), "signed anew each time");
    assert_eq!(done[4], 2);
    assert_eq!(scene.stored("zeros").await, ("application/octet-stream".into(), vec![0; 6 << 20]));

    for (lost, cancelled, said) in [(1000, false, "lost"), (0, true, "cancelled")] {
        browser.go(&scene.page).await;
        let given_up = browser.run(script, json!([lost, cancelled])).await;
        assert_eq!(given_up[1], said);
        let upload_token = given_up[0].as_str().unwrap().to_owned();
        let parts = pb::ListPartsRequest { upload_token, ..pb::ListPartsRequest::default() };
        assert_eq!(scene.api.clone().list_parts(parts).await.unwrap_err().code(), tonic::Code::NotFound, "{said}");
    }
    browser.close().await;
}

async fn other_bytes_than_those_of_the_file_are_refused(_: Backend) {
    let scene = Scene::new(Backend::Embedded).await;
    let browser = Browser::open().await;
    browser.go(&scene.page).await;
    // A network that changes what it carries, of each request the first time.
    let script = "const [own, ask] = [send, call], tried = new Set(), refusals = [];
        let made;
        window.call = async (method, ...rest) => {
            const answer = await ask(method, ...rest);
            if (method === 'CompleteUpload') made = answer;
            return answer;
        };
        window.send = async (method, url, headers, body, ...rest) => {
            const { pathname, searchParams } = new URL(url), what = pathname + searchParams.get('partNumber');
            const bytes = new Uint8Array(body.slice(0));
            if (!tried.has(what)) bytes[0] ^= 1;
            tried.add(what);
            return own(method, url, headers, bytes, ...rest).catch(error => {
                refusals.push(error.message);
                throw error;
            });
        };
        const file = new File([new Uint8Array(a[1])], a[2]);
        const how = { progress() {}, finishing() {}, signal: new AbortController().signal };
        const error = await ways[a[0]](file, 'demo', a[2], how).then(() => null, error => error.message);
        return { error, refusals, composite: made?.composite }";
    let put = browser.run(script, json!(["put", 5, "put"])).await;
    assert!(put["error"].as_str().is_some_and(|error| error.starts_with("S3 answers 400 ")), "{put}");
    assert_eq!(scene.stat("put").await.unwrap_err().code(), tonic::Code::NotFound);

    browser.go(&scene.page).await;
    let parts = browser.run(script, json!(["multipart", 12 << 20, "parts"])).await;
    let refused = |refusal: &serde_json::Value| refusal.as_str().unwrap().starts_with("S3 answers 400 ");
    let refusals = parts["refusals"].as_array().unwrap();
    assert!(parts["error"].is_null() && refusals.len() == 2 && refusals.iter().all(refused), "{parts}");
    assert_eq!(parts["composite"], 1);
    assert_eq!(scene.stored("parts").await.1, vec![0; 12 << 20]);
    browser.close().await;
}

/// Lets a page in, and never answers what it puts there. Tells of each request
/// that has begun, and of each that was broken off.
async fn silent() -> (String, UnboundedReceiver<()>, UnboundedReceiver<()>) {
    const LET_IN: &[u8] = b"HTTP/1.1 204 No Content\r\naccess-control-allow-origin: *\r\n\
        access-control-allow-methods: *\r\naccess-control-allow-headers: *\r\n\r\n";
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}/", listener.local_addr().unwrap());
    let ((tell_begun, begun), (tell_broken, broken)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let (tell_begun, tell_broken) = (tell_begun.clone(), tell_broken.clone());
            tokio::spawn(async move {
                let (mut head, mut is_put) = (Vec::new(), false);
                let mut bytes = vec![0; 64 << 10];
                while let Ok(len @ 1..) = connection.read(&mut bytes).await {
                    if is_put {
                        continue;
                    }
                    head.extend_from_slice(&bytes[..len]);
                    is_put = head.starts_with(b"PUT ");
                    if is_put {
                        // A test that has heard enough hears no more.
                        let _ = tell_begun.send(());
                    } else if head.ends_with(b"\r\n\r\n") {
                        connection.write_all(LET_IN).await.unwrap();
                        head.clear();
                    }
                }
                if is_put {
                    let _ = tell_broken.send(());
                }
            });
        }
    });
    (address, begun, broken)
}

async fn what_is_cancelled_leaves_nothing(backend: Backend) {
    let scene = Scene::new(backend).await;
    scene.let_in().await;
    let browser = Browser::open().await;
    browser.go(&format!("{}/?bucket={}", scene.page, scene.bucket)).await;
    let (silent, mut begun, mut broken_off) = silent().await;
    let hold = "window.own = send;
        window.sent = 0;
        window.send = (method, url, ...rest) => own(method, sent++ < a[1] ? url : a[0], ...rest)";
    browser.run(hold, json!([silent, 2])).await;
    let is =
        |key: &str, state: &str| format!("document.querySelector(\"#uploads [data-key='{key}'][data-state={state}]\")");
    let cancel = async |key: &str| {
        browser.click(&format!("#uploads [data-key='{key}'] button")).await;
        browser.until(&is(key, "cancelled")).await;
    };

    browser.click("[value=multipart]").await;
    browser.run(DROP, json!(["film", 40 << 20])).await;
    begun.recv().await.unwrap();
    browser.until(&format!("document.querySelector('#uploads progress')?.value >= {}", 16 << 20)).await;
    assert_eq!(scene.open().await, 1);
    cancel("film").await;
    assert_eq!(scene.open().await, 0, "the upload is given up");
    broken_off.recv().await.unwrap();

    // To leave the page is to give up what is not done.
    let (silent, mut begun, _broken_off) = self::silent().await;
    browser.go(&format!("{}/?bucket={}", scene.page, scene.bucket)).await;
    browser.run(hold, json!([silent, 0])).await;
    browser.click("[value=multipart]").await;
    browser.run(DROP, json!(["film", 40 << 20])).await;
    begun.recv().await.unwrap();
    assert_eq!(scene.open().await, 1);
    browser.go(&format!("{}/?bucket={}", scene.page, scene.bucket)).await;
    let given_up = async { while scene.open().await > 0 {} };
    tokio::time::timeout(Duration::from_secs(30), given_up).await.expect("the upload is given up");
    browser.run(hold, json!([silent, 0])).await;

    // What waits for its turn needs no other to end.
    browser.click("[value=put]").await;
    let names: Vec<_> = (0..5).map(|n| format!("small-{n}")).collect();
    for name in &names {
        browser.run(DROP, json!([name, RECIPE])).await;
    }
    for name in names.iter().rev() {
        cancel(name).await;
    }
    for name in names.iter().map(String::as_str).chain(["film"]) {
        assert_eq!(scene.stat(name).await.unwrap_err().code(), tonic::Code::NotFound, "{name}");
    }

    // Their places are free again, and a name is no more than that.
    browser.run("window.send = own", json!([])).await;
    let name = "<img src=x onerror=alert(1)>";
    browser.run(DROP, json!([name, RECIPE])).await;
    browser.until("document.querySelector('#uploads [data-state=done]')").await;
    let listed = browser.until("document.querySelector('#objects td')?.textContent").await;
    assert_eq!((listed, browser.run("return document.images.length", json!([])).await), (json!(name), json!(0)));
    assert_eq!(scene.stored(name).await.1, RECIPE.as_bytes());
    browser.close().await;
}

/// A call of the API as the page makes it: `List` of the bucket `demo`.
fn list(scene: &Scene, method: Method) -> reqwest::RequestBuilder {
    scene
        .http
        .request(method, format!("{}/fileaccess.v1.FileAccess/List", scene.page))
        .header("content-type", "application/grpc-web+proto")
        .body(&b"\0\0\0\0\x06\x0a\x04demo"[..])
}

async fn dev_prints_where_its_page_is_and_serves_it_on_loopback_only(_: Backend) {
    let refused = output(fileaccess(&["dev", "--web-listen", "0.0.0.0:0"])).await.unwrap_err();
    assert!(refused.contains("--web-listen: `0.0.0.0:0` is not loopback"), "{refused}");

    let mut dev = Running::start(fileaccess(&["dev", "--listen", "127.0.0.1:0", "--web-listen", "[::1]:0"]));
    dev.logged("listening");
    let said = dev.printed("Open ");
    let page = said.split(' ').nth(1).unwrap();
    assert!(page.starts_with("http://[::1]:"), "{said}");
    let answer = Probe::http_client().get(page).send().await.unwrap();
    assert_eq!(answer.headers()["x-content-type-options"], "nosniff");
    assert!(answer.headers()["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'; "));
    assert!(answer.text().await.unwrap().contains("<script src=\"page.js\" defer></script>"));
}

async fn the_page_answers_nobody_else(_: Backend) {
    let scene = Scene::new(Backend::Embedded).await;
    let own = list(&scene, Method::POST).header("origin", &scene.page).send().await.unwrap();
    assert_eq!(own.status(), 200);
    assert!(String::from_utf8_lossy(&own.bytes().await.unwrap()).contains("grpc-status:0"));

    for origin in ["http://evil.test", "null", &scene.s3, &scene.page.replace("http:", "https:")] {
        let answer = list(&scene, Method::POST).header("origin", origin).send().await.unwrap();
        assert_eq!(answer.status(), 403, "{origin}");
        let preflight = list(&scene, Method::OPTIONS).header("origin", origin).send().await.unwrap();
        assert!(!preflight.headers().contains_key("access-control-allow-origin"), "{origin}");
    }
    assert_eq!(list(&scene, Method::POST).send().await.unwrap().status(), 403);
    // A foreign name that leads to this address, and is its own origin.
    let rebound = |request: reqwest::RequestBuilder| request.header("host", "rebound.test");
    let answer = rebound(list(&scene, Method::POST)).header("origin", "http://rebound.test").send().await.unwrap();
    assert_eq!(answer.status(), 421);
    assert_eq!(rebound(scene.http.get(&scene.page)).send().await.unwrap().status(), 421);
    // What a form of another page could send.
    let mut plain = list(&scene, Method::POST).header("origin", &scene.page).build().unwrap();
    plain.headers_mut().insert("content-type", "text/plain".parse().unwrap());
    assert_eq!(scene.http.execute(plain).await.unwrap().status(), 400);
    assert_eq!(scene.http.get(format!("{}/page.rs", scene.page)).send().await.unwrap().status(), 404);

    let any = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let app = Stage::new(Backend::Embedded).await.app.clone();
    let refused = dev::web::serve(any, app, std::future::pending()).await.unwrap_err();
    assert!(refused.to_string().contains("loopback"), "{refused}");
}

async fn the_embedded_s3_lets_the_page_in_and_nobody_else(_: Backend) {
    let scene = Scene::new(Backend::Embedded).await;
    let url = scene.presigned("missing").await;
    let preflight = |origin: &str, method: &str| {
        let request = scene.http.request(Method::OPTIONS, &url).header("origin", origin);
        let request = request.header("access-control-request-method", method);
        request.header("access-control-request-headers", "content-type,x-amz-meta-a").send()
    };
    let by_name = scene.page.replace("127.0.0.1", "localhost");
    for origin in [&scene.page, &by_name] {
        for method in METHODS {
            let told = preflight(origin, method).await.unwrap();
            assert_eq!(told.status(), 200, "{method}");
            let header = |name: &str| told.headers()[name].to_str().unwrap().to_owned();
            assert_eq!(header("access-control-allow-origin"), *origin);
            assert_eq!(header("access-control-allow-headers"), "content-type,x-amz-meta-a");
            assert!(header("access-control-allow-methods").contains(method));
            assert!(header("vary").contains("origin"));
        }
        // Refusals must be readable too.
        let answer = scene.http.get(&url).header("origin", origin).send().await.unwrap();
        assert_eq!(answer.status(), 404);
        assert_eq!(answer.headers()["access-control-allow-origin"], origin.as_str());
        let exposed = answer.headers()["access-control-expose-headers"].to_str().unwrap();
        assert!(EXPOSED.iter().all(|name| exposed.contains(name)), "{exposed}");
    }
    assert_eq!(preflight(&scene.page, "PATCH").await.unwrap().status(), 403);
    for origin in ["http://evil.test", "null", "http://127.0.0.1:1"] {
        let told = preflight(origin, "GET").await.unwrap();
        assert_eq!(told.status(), 403);
        let answer = scene.http.get(&url).header("origin", origin).send().await.unwrap();
        for headers in [told.headers(), answer.headers()] {
            assert!(headers.keys().all(|name| !name.as_str().starts_with("access-control")), "{headers:?}");
        }
    }
}

async fn bootstrap_lets_pages_in_and_keeps_other_rules(backend: Backend) {
    let stage = Stage::new(backend).await;
    let s3 = stage.s3(Credentials::new("test", "test", None, None, "test"));
    let other = CorsRule::builder().id("other").allowed_origins("https://other.test").allowed_methods("GET");
    let other = CorsConfiguration::builder().cors_rules(other.build().unwrap()).build().unwrap();
    s3.put_bucket_cors().bucket(&stage.bucket).cors_configuration(other).send().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| output(bootstrap(folder.path(), &stage, arguments));

    let (first, second) = ("https://app.test", "http://127.0.0.1:8080");
    let told = run(&["--cors", first, "--cors", second]).await.unwrap();
    assert!(told.contains("bucket `files`: CORS rule `fileaccess` put"), "{told}");
    let rules = async || s3.get_bucket_cors().bucket(&stage.bucket).send().await.unwrap().cors_rules.unwrap();
    let had = rules().await;
    assert_eq!(had.iter().map(|rule| rule.id().unwrap()).collect::<Vec<_>>(), ["fileaccess", "other"]);
    assert_eq!(had[0].allowed_origins(), [first, second]);
    let again = run(&["--cors", first, "--cors", second]).await.unwrap();
    assert!(again.contains("is there"), "{again}");
    run(&["--cors", second]).await.unwrap();
    let now = rules().await;
    assert_eq!((now.len(), now[0].allowed_origins()), (2, &[second.to_owned()][..]));

    let printed = run(&["--print-policies", "--cors", "https://*.test"]).await.unwrap();
    let printed: serde_json::Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(printed["cors"]["CORSRules"][0]["AllowedOrigins"], json!(["https://*.test"]));
    assert_eq!(printed["cors"]["CORSRules"][0]["ExposeHeaders"], json!(EXPOSED));
    assert_eq!(rules().await, now);
    let wrong = run(&["--cors", "https://app.test/page"]).await.unwrap_err();
    assert!(wrong.contains("`https://app.test/page` is no origin"), "{wrong}");
}
