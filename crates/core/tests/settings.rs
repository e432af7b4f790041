//! Configuration: where settings come from, which wins, and what a wrong one gets.
#![allow(missing_docs)]

use std::time::Duration;

use polymq_core::{
    __private::inventory,
    Backend, Bus, Capabilities, Connection, Environment, Error, ErrorKind, Key, KnownBackend, Registry, Result, Secret,
    Settings,
    config::{Origin, redact_url},
};
use serde::Deserialize;

#[derive(Debug, Deserialize, Default, PartialEq)]
#[serde(default, deny_unknown_fields)]
struct Config {
    url: String,
    prefetch: u16,
    declare: bool,
    #[serde(with = "polymq_core::config::duration")]
    heartbeat: Duration,
    mode: Mode,
    password: Secret,
    group: Option<String>,
}

#[derive(Debug, Deserialize, Default, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Mode {
    #[default]
    Classic,
    Quorum,
}

/// Read, and never looked at.
#[derive(Debug, Deserialize)]
struct HasKey {
    #[allow(dead_code)]
    key_pin: u16,
}

fn refused(settings: &Settings) -> String {
    let error = settings.parse::<Config>("toy").expect_err("must be refused");
    assert_eq!(error.kind(), ErrorKind::Config);
    error.to_string()
}

#[test]
fn j1_precedence_rises_from_file_to_code() {
    let origins = [
        Origin::File("polymq.toml".into()),
        Origin::ForeignVariable("TOY_PREFETCH".into()),
        Origin::Variable("POLYMQ_TOY_PREFETCH".into()),
        Origin::Url,
        Origin::Code,
    ];
    for strong in 0..origins.len() {
        for weak in 0..strong {
            for order in [[strong, weak], [weak, strong]] {
                let mut settings = Settings::new();
                for at in order {
                    settings.set("prefetch", at.to_string(), origins[at].clone());
                }
                assert_eq!(settings.get("prefetch"), Some(strong.to_string().as_str()), "{strong} beats {weak}");
            }
        }
    }
}

#[test]
fn j1_a_url_the_environment_and_code_feed_one_struct() {
    let mut settings = Settings::from_url("toy://host?prefetch=50&heartbeat=250ms").expect("a URL");
    settings.set("declare", "on", Origin::Variable("POLYMQ_TOY_DECLARE".into()));
    let settings = settings.with("mode", "quorum").with("group", "a");
    let config: Config = settings.parse("toy").expect("valid");
    assert_eq!((config.prefetch, config.declare, config.heartbeat), (50, true, Duration::from_millis(250)));
    assert_eq!((config.mode, config.group.as_deref()), (Mode::Quorum, Some("a")));
    assert_eq!(config.url, "toy://host");
}

#[test]
fn j2_booleans_numbers_and_durations_are_strict() {
    for (text, expected) in [("0", false), ("no", false), ("false", false), ("OFF", false), ("1", true), ("Yes", true)]
    {
        let config: Config = Settings::new().with("declare", text).parse("toy").expect("valid");
        assert_eq!(config.declare, expected, "{text}");
    }
    let mut settings = Settings::new();
    settings.set("declare", "maybe", Origin::Variable("POLYMQ_TOY_DECLARE".into()));
    assert_eq!(
        refused(&settings),
        "toy: setting \"declare\" in the variable POLYMQ_TOY_DECLARE: \"maybe\" is not valid, expected true or false"
    );
    assert!(refused(&Settings::new().with("prefetch", "70000")).contains("\"70000\" is not valid"));
    assert!(refused(&Settings::new().with("heartbeat", "10")).contains("with its unit, such as 250ms"));
    assert!(refused(&Settings::new().with("mode", "stream")).contains("expected one of classic, quorum"));
}

#[test]
fn unknown_keys_name_the_near_ones() {
    let mut settings = Settings::new();
    settings.set("prefech", "5", Origin::File("polymq.toml".into()));
    let text = refused(&settings);
    assert!(text.contains("unknown setting \"prefech\", did you mean \"prefetch\"?"), "{text}");
    assert!(text.ends_with("in polymq.toml"), "{text}");
}

#[test]
fn a_url_in_code_has_its_query_read() {
    let settings = Settings::new().with("url", "toy://host?prefetch=50");
    assert_eq!((settings.get("url"), settings.get("prefetch")), (Some("toy://host"), Some("50")));
    let text = "no url at all";
    assert_eq!(Settings::new().with("url", text).get("url"), Some(text), "kept, to be refused");
}

#[test]
fn j8_secrets_are_in_no_error_and_no_debug_output() {
    let config: Config = Settings::new().with("password", "s3cr3t").parse("toy").expect("valid");
    assert_eq!(config.password.expose(), "s3cr3t");
    assert!(!format!("{config:?}").contains("s3cr3t"));
    let settings = Settings::from_url("toy://me:s3cr3t@host?password=s3cr3t&prefetch=x").expect("a URL");
    assert!(!format!("{settings:?}").contains("s3cr3t"));
    assert!(!refused(&settings).contains("s3cr3t"));
    for url in [
        "amqp://me:s3cr3t@host/v",
        "amqp://host?token=s3cr3t",
        "me:s3cr3t@host",
        "amqp//me:s3cr3t@host",
        "http://s3cr3t@host/v",
    ] {
        assert!(!redact_url(url).contains("s3cr3t"), "{}", redact_url(url));
    }
    // What is no URL, for more than one reason.
    for (url, shown) in [
        ("kafka://b1:9092,b2:9092?pass=s3cr3t", "kafka://b1:9092,b2:9092?***"),
        ("kafka://me:s3cr3t@b1:9092,b2:9092?token=s3cr3t", "***@b1:9092,b2:9092?***"),
        ("kafka://b1:9092,b2:9092#s3cr3t", "kafka://b1:9092,b2:9092?***"),
        ("amqp://me:s3c?r3t@host", "***"),
        ("kafka://b1:1,b2:2?user=a@b&pass=s3cr3t", "***"),
        ("amqp//me:s3c@r3t@host", "***@host"),
        // A user alone may be a token.
        ("http://s3cr3t@host/path", "http://***@host/path"),
        ("amqp://me:s3cr3t@host", "amqp://me:***@host"),
    ] {
        assert_eq!(redact_url(url), shown, "{url}");
    }
    let variables = Environment::from_iter([("POLYMQ_URL", "memory://b1:9092,b2:9092?pass=s3cr3t")]);
    let error = Bus::builder().environment(variables).check().expect_err("no URL");
    assert!(!format!("{error} {error:?}").contains("s3cr3t"), "{error}");
    let error = Settings::new().with("key_pin", "s3cr3t").parse::<HasKey>("toy").expect_err("no number").to_string();
    assert!(error.contains("\"key_pin\"") && !error.contains("s3cr3t"), "{error}");
    let error = Settings::from_url("://me:s3cr3t@host").expect_err("no URL");
    assert!(!format!("{error} {error:?}").contains("s3cr3t"));
}

/// What the query of a URL says belongs to that URL: it is gone with it, and does not count when the URL does not.
#[test]
fn the_query_of_a_url_that_is_not_used_says_nothing() {
    let file = || Origin::File("queues.toml".into());
    let variable = || Origin::Variable("POLYMQ_MEMORY_URL".into());
    let read = |urls: &[(&str, Origin)]| {
        let mut settings = Settings::new();
        urls.iter().for_each(|(url, origin)| settings.set_url(url, origin.clone()).expect("a URL"));
        (settings.get("url").map(str::to_owned), settings.get("capacity").map(str::to_owned))
    };
    let prod = (Some("memory://prod".to_owned()), None);
    let dev = "memory://dev?capacity=1";
    assert_eq!(read(&[(dev, file()), ("memory://prod", variable())]), prod);
    assert_eq!(read(&[("memory://prod", variable()), (dev, file())]), prod);
    assert_eq!(read(&[(dev, variable()), ("memory://prod", variable())]), prod);
    assert_eq!(read(&[("memory://prod", file()), (dev, variable())]).1.as_deref(), Some("1"));
    // One that was set beside the URL stays.
    let mut settings = Settings::from_url(dev).expect("a URL").with("capacity_bytes", "9");
    settings.merge(&Settings::from_url("memory://prod?capacity=2").expect("a URL"));
    assert_eq!((settings.get("url"), settings.get("capacity")), (Some("memory://prod"), Some("2")));
    assert_eq!(settings.get("capacity_bytes"), Some("9"));
    let mut weaker = Settings::new();
    weaker.set_url("memory://dev?capacity=3", file()).expect("a URL");
    settings.merge(&weaker);
    assert_eq!((settings.get("url"), settings.get("capacity")), (Some("memory://prod"), Some("2")));
}

/// What is said of a broker does not choose it, and nobody means it to be ignored.
#[test]
fn a_setting_of_a_backend_that_is_not_chosen_is_refused() {
    let check = |pairs: &[(&str, &str)]| {
        let mut registry = Registry::new();
        registry.add(std::sync::Arc::new(polymq_core::memory::MemoryBackend)).expect("free");
        registry.add(std::sync::Arc::new(Elsewhere)).expect("free");
        Bus::builder().registry(registry).environment(pairs.iter().copied().collect()).check()
    };
    let error = check(&[("POLYMQ_ELSEWHERE_URL", "elsewhere://me:s3cr3t@host")]).expect_err("not chosen");
    assert_eq!(error.kind(), ErrorKind::Config);
    let text = format!("{error} {error:?}");
    assert!(text.contains("POLYMQ_ELSEWHERE_URL") && text.contains("POLYMQ_BACKEND=elsewhere"), "{text}");
    assert!(!text.contains("s3cr3t"), "{text}");
    check(&[("POLYMQ_ELSEWHERE_URL", "elsewhere://host"), ("POLYMQ_BACKEND", "memory")]).expect("memory is chosen");
    check(&[("POLYMQ_ELSEWHERE_URL", "elsewhere://host"), ("POLYMQ_URL", "memory://here")]).expect("memory is chosen");
    for (variable, backend) in [("POLYMQ_ELSEWHERE_HOST", "elsewhere"), ("POLYMQ_LACKING_SERVERS", "lacking")] {
        let error = check(&[(variable, "broker")]).expect_err("not chosen").to_string();
        assert!(error.contains(variable) && error.contains(&format!("POLYMQ_BACKEND={backend}")), "{error}");
    }
    let lacking =
        check(&[("POLYMQ_LACKING_SERVERS", "broker"), ("POLYMQ_BACKEND", "Lakking")]).expect_err("not linked");
    assert_eq!(lacking.kind(), ErrorKind::NotCompiledIn, "by its other name: {lacking}");
}

// One that this program does not link.
inventory::submit! { KnownBackend { name: "lacking", others: &["lakking"], hint: "add it" } }

#[derive(Debug)]
struct Elsewhere;

#[async_trait::async_trait]
impl Backend for Elsewhere {
    fn name(&self) -> &'static str {
        "elsewhere"
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["elsewhere"]
    }

    fn keys(&self) -> &'static [Key] {
        &[]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn check(&self, _: &Settings) -> Result<()> {
        Ok(())
    }

    async fn connect(&self, _: &Settings) -> Result<std::sync::Arc<dyn Connection>> {
        Err(Error::closed("connect"))
    }
}

#[test]
fn a_variable_one_slip_away_is_refused_and_the_one_meant_is_named() {
    let check = |pairs: &[(&str, &str)]| Bus::builder().environment(pairs.iter().copied().collect()).check();
    for (slip, meant) in [
        ("POLYMQ_ULR", "POLYMQ_URL"),
        ("POLYMQ_URI", "POLYMQ_URL"),
        ("POLYMQ_URLS", "POLYMQ_URL"),
        ("POLYMQ_BACKED", "POLYMQ_BACKEND"),
        ("POLYMQ_PERFIX", "POLYMQ_PREFIX"),
    ] {
        let error = check(&[(slip, "memory://s3cr3t@here")]).expect_err("a slip");
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        let text = error.to_string();
        assert!(text.contains(slip) && text.contains(&format!("did you mean {meant}?")), "{text}");
        assert!(!format!("{text} {error:?}").contains("s3cr3t"), "{text}");
    }
    // What code has said is not looked for among the variables.
    let builder = Bus::builder().url("memory://here").environment([("POLYMQ_URI", "x")].into_iter().collect());
    builder.check().expect("not a slip");
    // Whoever has said what polymq asks for has not misspelt it; what looks like nothing of polymq's is another program's.
    check(&[("POLYMQ_URI", "x"), ("POLYMQ_URL", "memory://here")]).expect("not a slip");
    check(&[("POLYMQ_DOCKER", "never"), ("POLYMQ_HOME", "/srv")]).expect("somebody else's");
}

#[test]
fn a4_unknown_backends_list_what_is_linked_and_guess() {
    let registry = Registry::linked();
    assert!(registry.names().any(|name| name == "memory"));
    let error = registry.backend("memroy").expect_err("unknown");
    assert_eq!(error.kind(), ErrorKind::UnknownBackend);
    let text = error.to_string();
    assert!(text.contains("unknown backend \"memroy\"; linked: memory"), "{text}");
    assert!(text.contains("did you mean \"memory\"?"), "{text}");
    assert!(registry.backend("MEMORY").is_ok(), "names are compared without case");
}

#[test]
fn a5_double_registration_is_refused() {
    let mut registry = Registry::linked();
    let memory = std::sync::Arc::clone(&registry.backend("memory").expect("linked"));
    let error = registry.add(memory).expect_err("taken");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.to_string().contains("\"memory\""), "{error}");
}

#[tokio::test]
async fn j3_settings_are_checked_before_any_connection() {
    let environment: Environment =
        [("POLYMQ_BACKEND", "memory"), ("POLYMQ_MEMORY_CAPACITI", "5")].into_iter().collect();
    let error = polymq_core::Bus::builder().environment(environment).check().expect_err("unknown key");
    let text = error.to_string();
    assert!(text.contains("\"capaciti\", did you mean \"capacity\"?"), "{text}");
    assert!(text.contains("POLYMQ_MEMORY_CAPACITI"), "{text}");
    let error = polymq_core::Bus::builder().backend("memory").url("amqp://host").environment(Environment::default());
    let text = error.check().expect_err("another backend's URL").to_string();
    assert!(text.contains("scheme \"amqp\"") && text.contains("expected one of: memory"), "{text}");
}
