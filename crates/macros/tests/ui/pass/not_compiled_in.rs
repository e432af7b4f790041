//! A program that was built without any backend's feature: it knows what it lacks. Here, because this program is
//! built on its own, whatever features the workspace's tests enable.
use polymq::{Bus, ErrorKind, Registry};

fn main() {
    let registry = Registry::linked();
    assert_eq!(registry.names().collect::<Vec<_>>(), ["memory"]);
    for (name, feature) in [("amqp", "amqp"), ("amqps", "amqp"), ("mqtt", "mqtt")] {
        let error = Bus::builder().backend(name).check().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotCompiledIn, "{error}");
        assert!(error.to_string().contains(&format!("add the feature {feature:?}")), "{error}");
    }
    let error = Bus::builder().backend("amqq").check().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnknownBackend, "{error}");
}
