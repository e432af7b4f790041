//! Which backend runs is decided when the program starts, by the environment, unless code says otherwise.

use std::time::Duration;

use polymq::{ConsumeOptions, Environment, Error, ErrorKind, prelude::*};

fn environment<const N: usize>(pairs: [(&str, &str); N]) -> Environment {
    pairs.into_iter().collect()
}

async fn chosen<const N: usize>(pairs: [(&str, &str); N]) -> std::result::Result<Bus, Error> {
    Bus::builder().environment(environment(pairs)).connect().await
}

/// A program as a user writes it: it does not know the backend.
async fn echo(bus: &Bus, text: &str) -> String {
    let queue = bus.queue("echo");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.unwrap();
    queue.send(&text.to_owned()).await.unwrap();
    let delivery = tokio::time::timeout(Duration::from_secs(30), subscription.next()).await.unwrap().unwrap();
    let echoed = serde_json::from_slice(delivery.message().payload()).unwrap();
    delivery.ack().await.unwrap();
    echoed
}

/// A first run needs nothing, and the log warns that it keeps nothing; whoever chooses memory is not warned.
#[tokio::test]
async fn memory_is_the_default_and_the_log_says_so() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    let _logging = tracing::subscriber::set_default(subscriber);
    chosen([("POLYMQ_BACKEND", "memory")]).await.unwrap();
    assert_eq!(log.text(), "");
    let bus = chosen([]).await.unwrap();
    assert_eq!(bus.backend(), "memory");
    assert!(log.text().contains("WARN") && log.text().contains("POLYMQ_URL or POLYMQ_BACKEND"), "{:?}", log.text());
    assert_eq!(echo(&bus, "hello").await, "hello");
}

#[tokio::test]
async fn a_variable_chooses() {
    for pairs in [("POLYMQ_BACKEND", "memory"), ("POLYMQ_BACKEND", "Memory"), ("POLYMQ_URL", "memory://elsewhere")] {
        let bus = chosen([pairs]).await.unwrap();
        assert_eq!(bus.backend(), "memory", "{pairs:?}");
        assert_eq!(echo(&bus, pairs.1).await, pairs.1);
    }
}

/// Nothing listens on port 1, so the error tells who tried to connect.
#[cfg(all(feature = "amqp", feature = "mqtt"))]
#[tokio::test]
async fn the_same_program_tries_the_broker_that_the_variable_names() {
    for (name, url) in [("amqp", "amqp://127.0.0.1:1"), ("mqtt", "mqtt://127.0.0.1:1")] {
        for pairs in [
            vec![("POLYMQ_URL", url)],
            vec![("POLYMQ_BACKEND", name), ("POLYMQ_URL", url)],
            vec![("POLYMQ_BACKEND", name), (if name == "amqp" { "POLYMQ_AMQP_URL" } else { "POLYMQ_MQTT_URL" }, url)],
        ] {
            let error = Bus::builder().environment(pairs.clone().into_iter().collect()).connect().await.unwrap_err();
            assert_eq!(error.backend(), Some(name), "{pairs:?}: {error}");
            assert_eq!(error.kind(), ErrorKind::Disconnected, "{pairs:?}: {error}");
        }
    }
}

/// Whatever a backend answers to when it is linked is known when it is not.
#[test]
fn every_name_of_a_backend_is_known_without_its_feature() {
    let known: Vec<_> = polymq::__private::inventory::iter::<polymq::KnownBackend>.into_iter().collect();
    let registry = Registry::linked();
    for name in registry.names().filter(|name| *name != "memory") {
        let backend = registry.backend(name).unwrap();
        let known = known.iter().find(|known| known.name == name).unwrap_or_else(|| panic!("{name} is not known"));
        for other in backend.aliases().iter().chain(backend.schemes()).filter(|other| **other != name) {
            assert!(known.others.contains(other), "{other} of {name} is not known");
        }
    }
}

#[tokio::test]
async fn an_unknown_name_lists_the_linked_ones_and_guesses() {
    let error = chosen([("POLYMQ_BACKEND", "memroy")]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnknownBackend);
    let sentence = error.to_string();
    for part in ["unknown backend \"memroy\"", "linked: ", "memory", "did you mean \"memory\"?"] {
        assert!(sentence.contains(part), "{part:?} is missing: {sentence}");
    }
}

#[tokio::test]
async fn a_mistyped_backend_of_this_project_is_guessed_linked_or_not() {
    let error = chosen([("POLYMQ_BACKEND", "kakfa")]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnknownBackend);
    assert!(error.to_string().contains("did you mean \"kafka\"?"), "{error}");
}

#[test]
fn a_backend_without_its_feature_names_the_feature() {
    // A registry that holds nothing stands for a program without features; how a program that really was built
    // without them answers is shown by the tests of polymq-macros.
    for (name, feature) in
        [("amqp", "amqp"), ("AMQPS", "amqp"), ("mqtt", "mqtt"), ("kubemq", "kubemq"), ("embedded", "embedded")]
    {
        let error = Registry::new().backend(name).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotCompiledIn, "{error}");
        assert!(error.to_string().contains("not compiled in"), "{error}");
        assert!(error.to_string().contains(&format!("add the feature {feature:?}")), "{error}");
    }
}

#[test]
fn the_features_decide_what_is_linked() {
    let registry = Registry::linked();
    let names: Vec<_> = registry.names().collect();
    assert_eq!(names.contains(&"amqp"), cfg!(feature = "amqp"));
    assert_eq!(names.contains(&"mqtt"), cfg!(feature = "mqtt"));
    assert!(names.contains(&"memory"));
}

/// Code says memory while the variables name a broker that listens: nobody connects to it.
#[cfg(feature = "amqp")]
#[tokio::test]
async fn a6_what_code_has_not_chosen_is_not_connected() {
    let broker = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("amqp://{}", broker.local_addr().unwrap());
    let variables = environment([("POLYMQ_BACKEND", "amqp"), ("POLYMQ_URL", url.as_str())]);
    let bus = Bus::builder().backend("memory").environment(variables.clone()).connect().await.unwrap();
    assert_eq!(echo(&bus, "hello").await, "hello");
    let accepted = tokio::time::timeout(Duration::from_millis(200), broker.accept());
    assert!(accepted.await.is_err(), "somebody connected to the broker of the variables");

    // Without the choice in code, it is that broker which is tried.
    let tried = tokio::spawn(Bus::builder().environment(variables).connect());
    tokio::time::timeout(Duration::from_secs(30), broker.accept()).await.unwrap().unwrap();
    tried.abort();
}

/// A variable with our prefix that nobody reads is warned about. (One that looks like a slip is refused.)
#[test]
fn j1_an_unknown_variable_of_ours_is_warned_about() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
    tracing::subscriber::with_default(subscriber, || {
        let known =
            environment([("POLYMQ_BACKEND", "memory"), ("POLYMQ_MEMORY_CAPACITY", "5"), ("OTHERS_VARIABLE", "1")]);
        Bus::builder().environment(known).check().unwrap();
        assert_eq!(log.text(), "");
        Bus::builder().environment(environment([("POLYMQ_HOME", "s3cr3t-marker")])).check().unwrap();
    });
    let text = log.text();
    assert!(text.contains("WARN") && text.contains("POLYMQ_HOME"), "{text}");
    assert!(!text.contains("s3cr3t-marker"), "{text}");
}

#[derive(Clone, Default)]
struct Log(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn code_overrides_the_environment() {
    // Would fail at once if anything were tried with the variables.
    let variables = [("POLYMQ_BACKEND", "kafka"), ("POLYMQ_URL", "kafka://nowhere")];
    for builder in [Bus::builder().backend("memory"), Bus::builder().url("memory://code")] {
        let bus = builder.environment(environment(variables)).connect().await.unwrap();
        assert_eq!(bus.backend(), "memory");
    }
}

#[tokio::test]
async fn wrong_settings_are_refused_before_anything_is_connected() {
    for (pairs, parts) in [
        ([("POLYMQ_BACKEND", "memory"), ("POLYMQ_MEMORY_CAPACITTY", "1")], ["capacitty", "did you mean \"capacity\""]),
        ([("POLYMQ_BACKEND", "memory"), ("POLYMQ_MEMORY_CAPACITY", "many")], ["\"many\"", "POLYMQ_MEMORY_CAPACITY"]),
        ([("POLYMQ_BACKEND", "memory"), ("POLYMQ_URL", "no url")], ["no URL", "scheme://"]),
        ([("POLYMQ_BACKEND", "memory"), ("POLYMQ_URL", "mqtt://host")], ["scheme \"mqtt\"", "expected one of: memory"]),
    ] {
        let error = chosen(pairs).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        for part in parts {
            assert!(error.to_string().contains(part), "{part:?} is missing: {error}");
        }
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}

/// Row J1: the variables that people have set already lead to their broker, and `POLYMQ_URL` is stronger than each of them.
#[cfg(all(feature = "amqp", feature = "kafka", feature = "kubemq", feature = "mqtt", feature = "sqs"))]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn j1_variables_of_each_ecosystem_lead_to_its_broker() {
    /// Connects as the environment says, to nobody who answers; returns whether this listener was asked.
    async fn asked(listener: &tokio::net::TcpListener, environment: Environment) -> bool {
        let connecting = tokio::spawn(Bus::builder().environment(environment).connect());
        let accepted = tokio::time::timeout(Duration::from_secs(30), listener.accept()).await;
        connecting.abort();
        accepted.is_ok_and(|accepted| accepted.is_ok())
    }
    let listen = async || tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let cases: [(&str, &[(&str, &str)]); 7] = [
        ("amqp", &[("RMQ_HOST", "127.0.0.1"), ("RMQ_PORT", "PORT"), ("RMQ_USER", "me"), ("RMQ_PASS", "secret")]),
        ("kafka", &[("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:PORT")]),
        ("kubemq", &[("KUBEMQ_ADDRESS", "127.0.0.1:PORT"), ("KUBEMQ_CLIENT_ID", "me")]),
        ("mqtt", &[("MQTT_HOST", "127.0.0.1"), ("MQTT_PORT", "PORT")]),
        ("mqtt", &[("MQTT_URI", "mqtt://127.0.0.1:PORT")]),
        ("sqs", &[("AWS_ENDPOINT_URL", "http://127.0.0.1:PORT"), ("AWS_REGION", "us-east-1")]),
        ("sqs", &[("AWS_ENDPOINT_URL_SQS", "http://127.0.0.1:PORT"), ("AWS_REGION", "us-east-1")]),
    ];
    for (backend, variables) in cases {
        let (theirs, ours) = (listen().await, listen().await);
        let port = theirs.local_addr().unwrap().port().to_string();
        let named: Vec<_> = variables.iter().map(|(name, value)| (*name, value.replace("PORT", &port))).collect();
        let keys = [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("POLYMQ_BACKEND", backend)];
        let environment = |url: Option<&str>| -> Environment {
            let url = url.map(|url| ("POLYMQ_URL", url));
            named.iter().map(|(name, value)| (*name, value.as_str())).chain(keys).chain(url).collect()
        };
        assert!(asked(&theirs, environment(None)).await, "{variables:?} did not lead to the broker");
        let url = format!("{backend}://{}", ours.local_addr().unwrap());
        assert!(asked(&ours, environment(Some(&url))).await, "POLYMQ_URL is weaker than {variables:?}");
    }
}
