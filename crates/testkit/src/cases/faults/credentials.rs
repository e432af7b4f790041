//! F12: credentials change.

use std::{sync::Arc, time::Duration};

use polymq_core::ErrorKind;
use tokio::time::Instant;

use super::scenario::{Expect, Plan, Scenario};
use crate::{Case, Cx, PATIENCE, Proxy, case::run, drive::closes, eventually};

pub(in crate::cases) const CASES: &[Case] = &[Case::new("F12_password_changes", run!(password_changes))
    .with("passwords", |harness| harness.passwords().map(drop))
    .own_broker()];

const OLD: &str = "the-first-one";
const NEW: &str = "the-second-one";

/// The password is changed at the broker: who still has the old one is refused with a typed error, and health says why
/// without telling it; who has the new one works at once; when the old one is good again, everything goes on, and
/// nothing that was accepted is lost.
pub async fn password_changes(cx: Cx) {
    let passwords = cx.harness().passwords().expect("decided before");
    passwords.set(OLD).await;
    let proxy = Arc::new(Proxy::start(passwords.address()).await.expect("a proxy"));
    let url = |password| passwords.url(password, proxy.address());
    let plan = Plan { proxy: Some(Arc::clone(&proxy)), ..Plan::at(url(OLD)) };
    let mut scenario = Scenario::start(&cx, plan).await;
    scenario.sends_and_handles(20).await;

    passwords.set(NEW).await;
    proxy.reset_all();
    let error = match cx.builder_to(url(OLD)).with("connect_timeout", "50s").connect().await {
        Err(error) => error,
        // Where nothing is connected before it is used.
        Ok(bus) => {
            let error = bus.queue(scenario.queue.address().name()).send(&"refused").await.expect_err("refused");
            closes(&bus).await;
            error
        }
    };
    assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error:?}");
    let error = scenario.perhaps(Duration::from_secs(2)).await.expect_err("the old password is refused");
    let kinds = [ErrorKind::Unauthenticated, ErrorKind::Disconnected, ErrorKind::Timeout, ErrorKind::UnknownOutcome];
    assert!(kinds.contains(&error.kind()), "{error:?}");
    scenario.states.goes_down(PATIENCE, 0).await;
    let told = eventually(PATIENCE, || async {
        let health = scenario.bus.health();
        // Until the first attempt was refused, the reason is that the connection was lost.
        let reason = health.reason.as_ref().map(ToString::to_string).unwrap_or_default();
        let known =
            ["credential", "password", "authenti", "login", "not authorized", "sasl", "refused", "security token"];
        if known.iter().any(|word| reason.to_lowercase().contains(word)) {
            return Ok(reason);
        }
        // Where health is what the last request has met, that may have been the end of an old connection.
        let _ = scenario.perhaps(Duration::from_secs(2)).await;
        Err(format!("health does not say why: {health}"))
    })
    .await;
    assert!(!told.contains(OLD) && !format!("{error:?}").contains(OLD), "{told}; {error:?}");
    cx.note(format_args!("meanwhile: {told}"));

    let mut renewed = Scenario::start(&cx, Plan::at(url(NEW))).await;
    renewed.sends_and_handles(20).await;
    renewed.closes().await;

    passwords.set(OLD).await;
    let back = Instant::now();
    scenario.send(20);
    scenario.works_again(back).await;
    scenario.ends(Expect::Flips).await;
}
