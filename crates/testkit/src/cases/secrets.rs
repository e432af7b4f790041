//! X4: no secret in logs, errors and debug output, at the finest level of logging.

use std::time::Duration;

use polymq_core::{Attempt, ConsumerFactory, ErrorKind, Failure, Kinds, Message, Settings, State, dead_letter};
use serde::{Deserialize, Serialize};

use crate::{
    Case, Cx, captured,
    case::run,
    cx::CONNECTING,
    drive::{Log, closes, counted, dead_letters, refused, retry_every, start, subscribe, take},
};

pub(super) const CASES: &[Case] = &[Case::new("X4_nothing_secret_is_told", run!(nothing_secret_is_told)).alone()];

/// The URL with this password in it.
fn with_password(url: &str, password: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or((url, ""));
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, rest) = rest.split_at(end);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    format!("{scheme}://somebody:{password}@{host}{rest}")
}

/// A URL that the broker lets in, and what is secret in it: a password of our own, where the harness can set one, or the token that
/// stands for it.
async fn marked_login(cx: &Cx) -> (String, Option<String>) {
    let Ok(passwords) = cx.harness().passwords() else { return (cx.harness().url(None), None) };
    let password = format!("v4lid-{:016x}", fastrand::u64(..));
    passwords.set(&password).await;
    let url = passwords.url(&password, passwords.address());
    let authority = url.split_once("://").map_or("", |(_, rest)| rest);
    let login = authority.split(['/', '?']).next().and_then(|authority| authority.rsplit_once('@'));
    // Where the password is not before the host, as with tokens among the settings, it is as it was set.
    let secret = login.and_then(|(login, _)| login.split_once(':')).map_or(password, |(_, secret)| secret.to_owned());
    (url, Some(secret))
}

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    id: u64,
}

/// Fails the first time, without telling what is in the message.
async fn bill(_: Order, message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
    log.add(&message, attempt.0);
    if attempt.0 == 1 { Err(Failure::new("not today")) } else { Ok(()) }
}

/// With a marked password in the URL, a valid one too where the broker knows passwords, and marks in bodies and headers, through success, retry, dead letters and refusals:
/// no line of any log, no error and no debug output holds a mark.
pub async fn nothing_secret_is_told(cx: Cx) {
    let mark = format!("s3cr3t-{:016x}", fastrand::u64(..));
    let (password, body, header) = (format!("{mark}-password"), format!("{mark}-body"), format!("{mark}-header"));
    let log = captured::Log::look();
    let mut shown = Vec::new();

    let url = with_password(&cx.harness().url(None), &password);
    let mut kinds = Kinds::new();
    kinds.bind::<Order>("order", None).expect("no conflict");
    let builder = cx.builder_to(url.clone()).kinds(kinds.clone());
    shown.push(format!(
        "{builder:?} {:?}",
        Settings::from_url(&url).map(|settings| settings.with("password", password))
    ));
    let mut login = None;
    // A broker that knows passwords refuses this one; one that knows none does not look at it.
    let bus = match builder.connect().await {
        Ok(bus) => bus,
        Err(error) => {
            shown.push(format!("{error} {error:?}"));
            let (url, secret) = marked_login(&cx).await;
            login = secret;
            shown.push(format!("{:?}", Settings::from_url(&url)));
            let builder = cx.builder_to(url).kinds(kinds);
            shown.push(format!("{builder:?}"));
            builder.connect().await.unwrap_or_else(|error| panic!("{CONNECTING}{error:?}"))
        }
    };
    let queue = cx.queue(&bus);
    let handled = self::Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    let route = consumers.state(handled.clone()).route(queue.address().name(), bill);
    route.policy(retry_every(Duration::from_millis(50), 3));
    if consumers.check().is_err() {
        consumers = ConsumerFactory::new(&bus);
        consumers.state(handled.clone()).route(queue.address().name(), bill).policy(polymq_core::FailurePolicy {
            mode: polymq_core::RetryMode::InPlace,
            ..retry_every(Duration::from_millis(50), 3)
        });
    }
    let running = start(consumers).await;
    let marked =
        |text: String| Message::new(text).with_content_type("application/json").with_header("token", header.clone());
    let good = marked(format!("{{\"id\": 1, \"card\": \"{body}\"}}")).with_kind("order");
    let wrong_type = marked(format!("{{\"id\": \"{body}\"}}")).with_kind("order");
    let no_json = marked(format!("{{\"id\": {body}")).with_kind("order");
    let unknown = marked(body.clone()).with_kind("nobody's");
    for message in [good.clone(), wrong_type, no_json, unknown] {
        shown.push(format!("{message:?}"));
        let receipt = queue.send_message(message).await.expect("send");
        shown.push(format!("{receipt:?}"));
    }
    let control = marked(body.clone()).with_header("token", format!("{header}\n"));
    let error = refused(queue.send_message(control).await, &[ErrorKind::InvalidInput]);
    shown.push(format!("{error} {error:?}"));
    if let Some(max) = bus.capabilities().max_payload {
        let large = body.repeat(max / body.len() + 1);
        let error = refused(queue.send_message(Message::new(large)).await, &[ErrorKind::TooLarge]);
        shown.push(format!("{error} {error:?}"));
    }
    counted(&running, queue.address().name(), "handled", 1).await;
    counted(&running, queue.address().name(), "dead_lettered", 3).await;
    shown.push(format!("{running:?} {bus:?} {queue:?} {:?} {:?}", bus.health(), bus.connection()));
    running.stop().await.expect("stop");

    let mut letters = dead_letters(&bus, &queue).await;
    for letter in take(&mut letters, 3).await {
        let reason = letter.message().system_headers().get(dead_letter::REASON).unwrap_or_default();
        shown.push(format!("{reason} {letter:?}"));
        letter.ack().await.expect("ack");
    }
    // A delivery that is dropped is warned about.
    queue.send_message(good).await.expect("send");
    let mut subscription = subscribe(&queue).await;
    drop(take(&mut subscription, 1).await);
    for delivery in take(&mut subscription, 1).await {
        delivery.drop_message("as the case wants").await.expect("drop");
    }
    shown.push(format!("{subscription:?}"));
    subscription.close().await.expect("close");
    closes(&bus).await;

    let of_login = |text: &str| login.as_ref().is_some_and(|login| text.contains(login));
    let told: Vec<_> = shown.iter().filter(|text| text.contains(&mark) || of_login(text)).collect();
    assert!(told.is_empty(), "an error or debug output tells a secret: {told:#?}");
    let text = log.text();
    assert!(text.contains("message not handled"), "the log was looked at: {} bytes", text.len());
    let is_ours = |line: &str| line.contains(" polymq");
    let lines: Vec<_> = text.lines().filter(|line| line.contains(&mark) || of_login(line)).collect();
    let is_login = |line: &str| of_login(line) || line.contains(&format!("{mark}-password"));
    let ours: Vec<_> = lines.iter().filter(|line| is_ours(line) || is_login(line)).collect();
    assert!(ours.is_empty(), "{} lines of the log tell a secret, such as {:#?}", ours.len(), ours.first());
    cx.note(format_args!(
        "{} lines were logged; {} of the protocol's own library show a body or header at its finest level",
        text.lines().count(),
        lines.len()
    ));
}
