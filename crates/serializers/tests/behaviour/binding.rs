//! The serializer of a type, rule by rule.

use polymq_serializers::{Format, RegistryError, Serializers};

mod shop {
    pub(crate) mod orders {
        pub(crate) struct Paid;
        pub(crate) struct Envelope<T>(pub(crate) T);
        pub(crate) mod v2 {
            pub(crate) struct Paid;
        }
    }
    pub(crate) mod orders_old {
        pub(crate) struct Paid;
    }
}

use shop::{orders, orders_old};

type Setup = fn(&mut Serializers) -> Result<(), RegistryError>;
type Ask = fn(&Serializers) -> Result<&Format, RegistryError>;

/// Setup, question, and the name of the answer or the start of the error.
const RULES: &[(&str, Setup, Ask, Result<&str, &str>)] = &[
    ("nothing bound: JSON", |_| Ok(()), |s| s.for_type::<orders::Paid>(), Ok("json")),
    ("the default is used", |s| s.bind_default("msgpack"), |s| s.for_type::<orders::Paid>(), Ok("msgpack")),
    (
        "the type itself wins over everything",
        |s| {
            s.bind::<orders::Paid>("text")?;
            s.bind_fallback("shop::orders::Paid", "bytes")?;
            s.bind_default("msgpack")
        },
        |s| s.for_type::<orders::Paid>(),
        Ok("text"),
    ),
    (
        "a binding is for its type only",
        |s| s.bind::<orders::Paid>("text"),
        |s| s.for_type::<orders::v2::Paid>(),
        Ok("json"),
    ),
    ("unsized types are bound too", |s| s.bind::<str>("text"), |s| s.for_type::<str>(), Ok("text")),
    (
        "a group wins over the default",
        |s| {
            s.bind_default("msgpack")?;
            s.bind_fallback("orders", "bytes")
        },
        |s| s.for_type::<orders::Paid>(),
        Ok("bytes"),
    ),
    (
        "a group covers modules below",
        |s| s.bind_fallback("orders::", "bytes"),
        |s| s.for_type::<orders::v2::Paid>(),
        Ok("bytes"),
    ),
    (
        "a group is whole segments",
        |s| s.bind_fallback("orders", "bytes"),
        |s| s.for_type::<orders_old::Paid>(),
        Ok("json"),
    ),
    (
        "a group may be a type with its arguments left out",
        |s| s.bind_fallback("orders::Envelope", "bytes"),
        |s| s.for_type::<orders::Envelope<u8>>(),
        Ok("bytes"),
    ),
    (
        "an argument does not make a type part of its group",
        |s| s.bind_fallback("orders", "bytes"),
        |s| s.for_type::<Option<orders::Paid>>(),
        Ok("json"),
    ),
    (
        "more segments win, in either order",
        |s| {
            s.bind_fallback("orders", "bytes")?;
            s.bind_fallback("orders::v2", "text")?;
            s.bind_fallback("shop", "msgpack")
        },
        |s| s.for_type::<orders::v2::Paid>(),
        Ok("text"),
    ),
    (
        "equal groups that disagree are an error",
        |s| {
            s.bind_fallback("shop", "bytes")?;
            s.bind_fallback("orders", "text")
        },
        |s| s.for_type::<orders::Paid>(),
        Err("type `behaviour::binding::shop::orders::Paid` is matched by the fallbacks \"shop\" and \"orders\" alike"),
    ),
    (
        "even if a weaker one comes between",
        |s| {
            s.bind_fallback("shop::orders", "bytes")?;
            s.bind_fallback("shop", "json")?;
            s.bind_fallback("orders::v2", "text")
        },
        |s| s.for_type::<orders::v2::Paid>(),
        Err(
            "type `behaviour::binding::shop::orders::v2::Paid` is matched by the fallbacks \"shop::orders\" and \"orders::v2\"",
        ),
    ),
    (
        "a better group ends the tie",
        |s| {
            s.bind_fallback("shop", "bytes")?;
            s.bind_fallback("orders", "text")?;
            s.bind_fallback("shop::orders", "msgpack")
        },
        |s| s.for_type::<orders::Paid>(),
        Ok("msgpack"),
    ),
    (
        "so does the type itself",
        |s| {
            s.bind_fallback("shop", "bytes")?;
            s.bind_fallback("orders", "text")?;
            s.bind::<orders::Paid>("json")
        },
        |s| s.for_type::<orders::Paid>(),
        Ok("json"),
    ),
    (
        "equal groups that agree are none",
        |s| {
            s.bind_fallback("shop", "text")?;
            s.bind_fallback("orders", "text")
        },
        |s| s.for_type::<orders::Paid>(),
        Ok("text"),
    ),
    (
        "without a default, an unbound type is an error",
        |s| {
            s.clear_default();
            Ok(())
        },
        |s| s.for_type::<u8>(),
        Err("type `u8` has no serializer"),
    ),
    (
        "without a default, groups still count",
        |s| {
            s.clear_default();
            s.bind_fallback("orders", "text")
        },
        |s| s.for_type::<orders::Paid>(),
        Ok("text"),
    ),
];

#[test]
fn every_rule_gives_its_serializer() {
    for (rule, setup, ask, expected) in RULES {
        let mut serializers = Serializers::builtin();
        setup(&mut serializers).unwrap();
        match (ask(&serializers), expected) {
            (Ok(format), Ok(name)) => assert_eq!(format.name(), *name, "{rule}"),
            (Err(error), Err(start)) => assert!(error.to_string().starts_with(start), "{rule}: {error}"),
            (answer, _) => panic!("{rule}: expected {expected:?}, got {answer:?}"),
        }
    }
}

#[test]
fn contradictions_are_refused_when_they_are_made() {
    let mut serializers = Serializers::builtin();
    serializers.bind::<u8>("json").unwrap();
    serializers.bind::<u8>("json").unwrap();
    let twice = serializers.bind::<u8>("text").unwrap_err();
    assert_eq!(
        twice.to_string(),
        "type `u8` is bound to \"json\" and cannot be bound to \"text\" too; keep one of them"
    );
    serializers.bind_fallback("orders", "json").unwrap();
    serializers.bind_fallback("orders::", "json").unwrap();
    let twice = serializers.bind_fallback("orders", "text").unwrap_err();
    assert!(matches!(twice, RegistryError::AlreadyBound { .. }), "{twice}");
    assert_eq!(serializers.for_type::<u8>().unwrap(), &Format::JSON);
}

#[test]
fn unknown_serializers_and_groups_are_refused() {
    let mut serializers = Serializers::builtin();
    let unknown = |result: Result<(), RegistryError>| matches!(result, Err(RegistryError::UnknownName { .. }));
    assert!(unknown(serializers.bind::<u8>("jsn")));
    assert!(unknown(serializers.bind_default("jsn")));
    assert!(unknown(serializers.bind_fallback("orders", "jsn")));
    for group in ["", "::", "a b", "a::::b", "a:b", "Vec<u8>"] {
        let refused = serializers.bind_fallback(group, "json");
        assert!(matches!(refused, Err(RegistryError::Invalid { what: "group", .. })), "{group:?}");
    }
}
