//! Requests over HTTP itself, without anybody who keeps messages: the suite's cases, and peers that know nothing of polymq.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use crate::peer::{Act, Stub, answer, ask, bus, free_url, request};
use polymq_core::{
    Answer, Backend, Bus, ConsumerFactory, ConsumerRunner, Environment, ErrorKind, Failure, Message, Retry,
};
use polymq_http::HttpBackend;
use polymq_signing::{PublicKeys, Signer, SigningKey, Verifier};
use polymq_testkit::{Harness, cases, run_case};

/// Consumers listen where messages are sent.
#[derive(Debug)]
struct Bare(String);

impl Harness for Bare {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(HttpBackend)
    }

    fn url(&self, _: Option<SocketAddr>) -> String {
        self.0.clone()
    }
}

fn runs(id: &str) {
    let url = free_url();
    let harness: Arc<dyn Harness> = Arc::new(Bare(url));
    let case = cases::find(id).unwrap_or_else(|| panic!("no case {id}"));
    let outcome = run_case(case, &harness);
    assert_eq!((outcome.result, outcome.decided), (Ok(()), None), "{id}");
}

#[test]
fn answers_come_back() {
    runs("Q1_answer");
}

#[test]
fn errors_come_back() {
    runs("Q2_error_reply");
}

#[test]
fn late_answers_are_nobodys() {
    runs("Q3_late_reply");
}

#[test]
fn many_answers_do_not_cross() {
    runs("Q4_many_at_once");
}

#[test]
fn a_failed_request_is_told_to_come_again() {
    runs("Q5_answer_of_a_later_attempt");
}

#[tokio::test]
async fn c19_a_handlers_value_is_the_body_of_the_response() {
    #[derive(serde::Serialize)]
    struct Price {
        eur: u32,
    }
    async fn price(article: String) -> Result<Answer<Price>, Failure> {
        match article.as_str() {
            "nothing" => Err(Failure::permanent("we do not sell nothing")),
            article => Ok(Answer(Price { eur: article.len() as u32 })),
        }
    }
    let url = free_url();
    let at: SocketAddr = url.trim_start_matches("http://").parse().expect("an address");
    let bus = bus(&format!("{url}/shop?method=GET")).await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("price", price);
    consumers.route("silent", |_: String| async {});
    let running = ConsumerRunner::new(consumers).start().await.expect("start");
    let json = "content-type: application/json\r\n";
    let told = ask(at, &request("GET", "/shop/price", json, "\"chair\"")).await;
    assert_eq!((told.status(), told.text().as_str()), (200, "{\"eur\":5}"));
    assert_eq!(told.header("content-type"), Some("application/json"));
    let told = ask(at, &request("GET", "/shop/price", json, "\"nothing\"")).await;
    assert!(told.status() == 422 && told.text().contains("we do not sell nothing"), "{}", told.text());
    assert_eq!(ask(at, &request("POST", "/shop/price", json, "\"chair\"")).await.status(), 405);
    let reply = bus.request("silent", &"hello").await.expect("acknowledged");
    assert!(reply.message().payload().is_empty(), "204");
    running.stop().await.expect("stop");
    bus.close().await.expect("close");
}

#[tokio::test]
async fn a_foreign_server_is_asked_and_its_failures_are_typed() {
    let stub = Stub::start(|request| match request.first_line.as_str() {
        "POST /good HTTP/1.1" => answer("200 OK", "content-type: application/json\r\n", "{\"eur\":5}"),
        "POST /page HTTP/1.1" => answer("200 OK", "content-type: text/html\r\n", "<h1>Hello</h1>"),
        "POST /busy HTTP/1.1" => answer("429 Too Many Requests", "retry-after: 3\r\n", ""),
        "POST /gone HTTP/1.1" => answer("404 Not Found", "", ""),
        _ => Act::Silence,
    })
    .await;
    let bus = bus(&stub.url()).await;
    let reply = bus.request("good", &1).await.expect("a reply");
    assert_eq!(reply.decode::<std::collections::BTreeMap<String, u32>>().expect("JSON")["eur"], 5);
    let page = bus.request("page", &1).await.expect("a reply");
    assert_eq!(page.decode::<u32>().expect_err("no format for pages").kind(), ErrorKind::Decode);
    let error = bus.request("busy", &1).await.expect_err("429");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Busy, Retry::After(Duration::from_secs(3))));
    assert_eq!(bus.request("gone", &1).await.expect_err("404").kind(), ErrorKind::NotFound);
    let impatient = bus.queue("silence").with_timeout(Duration::from_secs(2));
    let error = impatient.request(&1).await.expect_err("silence");
    assert!(stub.is_unanswered(&error, |asked| asked.first_line.starts_with("POST /silence")), "{error}");
    let error = bus.topic("prices").request_message(Message::new("1")).await.expect_err("many answers");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

/// The response is signed as a message is, and believed by who has asked.
#[tokio::test]
async fn signed_requests_have_signed_answers() {
    let (key, _) = SigningKey::generate("ours").expect("a key");
    let known = PublicKeys::new().with(key.id(), key.public()).expect("a public key");
    let url = free_url();
    let layered = async || {
        let builder = Bus::builder().url(url.as_str()).environment(Environment::default());
        let builder = builder.layer(Verifier::new(known.clone())).layer(Signer::new(key.clone()));
        builder.connect().await.expect("connects")
    };
    let (serving, asking) = (layered().await, layered().await);
    let mut consumers = ConsumerFactory::new(&serving);
    consumers.route("double", async |n: u64| Answer(n * 2));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let reply: u64 = asking.request("double", &21_u64).await.expect("answered").decode().expect("a number");
    assert_eq!(reply, 42);
    running.stop().await.expect("stops");
}
