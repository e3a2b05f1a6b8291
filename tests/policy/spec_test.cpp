#include "policy/spec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "base/error.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

std::string message_of(std::string_view spec) {
  try {
    make_policy(spec);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}

TEST(Spec, CanonicalFormNamesWhatDiffersFromTheDefaults) {
  EXPECT_EQ(make_policy("restkv").canonical, "restkv");
  EXPECT_EQ(make_policy("restkv()").canonical, "restkv");
  EXPECT_EQ(make_policy("restkv(alpha=0.30)").canonical, "restkv");
  EXPECT_EQ(make_policy(" restkv ( beta = 1e3 , alpha = .5 ) ").canonical, "restkv(alpha=0.5,beta=1000)");
  EXPECT_EQ(make_policy("snapkv(pooling=max,kernel=7)").canonical, "snapkv(kernel=7,pooling=max)");
  EXPECT_EQ(make_policy("random(seed=7)").canonical, "random(seed=7)");
}

TEST(Spec, EveryParameterBelongsToAStep) {
  for (const Method* method : registered_methods()) {
    for (const Parameter& parameter : method->parameters) {
      EXPECT_NE(parameter.step, Parameter::Step::none) << written_name(*method) << ": " << parameter.name;
    }
  }
}

TEST(Spec, AMethodThatIsAnotherWithoutAStepNamesOneThatThereIs) {
  int ablations = 0;
  for (const Method* method : registered_methods()) {
    if (method->ablation.of.empty()) continue;
    ++ablations;
    EXPECT_NE(find_method(method->ablation.of), nullptr) << method->name;
    EXPECT_NE(name_of(method->ablation.step), "") << method->name;
  }
  EXPECT_GT(ablations, 0);
}

TEST(Spec, CanonicalFormParsesBackToItself) {
  for (const Method* method : registered_methods()) {
    const auto is_file = [](const Parameter& parameter) { return parameter.kind == Parameter::Kind::file; };
    if (method->step != Method::Step::policy || std::ranges::any_of(method->parameters, is_file)) continue;
    std::string spec = method->name + "(";
    for (const Parameter& parameter : method->parameters) {
      if (spec.back() != '(') spec += ',';
      switch (parameter.kind) {
        case Parameter::Kind::choice:
          spec += parameter.name + "=" + parameter.choices.back();
          break;
        case Parameter::Kind::flag:
          spec += parameter.name + (parameter.default_value == "true" ? "=false" : "=true");
          break;
        case Parameter::Kind::integer:
          spec += parameter.name + "=9";
          break;
        case Parameter::Kind::real:
          spec += parameter.name + (parameter.minimum > 0.125 ? "=3.5" : "=0.125");
          break;
        default:
          spec += parameter.name + "=" + parameter.default_value;
      }
    }
    spec += ")";
    SCOPED_TRACE(spec);
    const std::string canonical = make_policy(spec).canonical;
    EXPECT_EQ(make_policy(canonical).canonical, canonical);
  }
}

TEST(Spec, UnknownNamesSuggestTheNearest) {
  EXPECT_NE(message_of("snapkw").find("Did you mean 'snapkv'?"), std::string::npos);
  EXPECT_NE(message_of("restkv(alhpa=0.5)").find("Did you mean 'alpha'?"), std::string::npos);
  EXPECT_NE(message_of("snapkv(pooling=maxx)").find("Did you mean 'max'?"), std::string::npos);
  EXPECT_NE(message_of("zzzzzzzz").find("Known: "), std::string::npos);
}

TEST(Spec, MalformedAndIllegalSpecsAreRefused) {
  for (const char* spec : {"",
                           "restkv(",
                           "restkv)",
                           "restkv(alpha)",
                           "restkv(alpha=)",
                           "restkv(alpha=0.5",
                           "restkv(alpha=0.5,)",
                           "restkv(alpha=0.5) x",
                           "+restkv",
                           "restkv+",
                           "restkv(alpha=0.1,alpha=0.2)",
                           "restkv(alpha=1.5)",
                           "restkv(alpha=nan)",
                           "restkv(alpha=abc)",
                           "restkv(window=0)",
                           "restkv(window=2.5)",
                           "restkv(kernel=4)",
                           "restkv(window=99999999999)",
                           "restkv(projection=yes)",
                           "restkv(alpha=\"0.5)",
                           "recent(window=3)",
                           "snapkv+recent",
                           "random(seed=-1)"}) {
    EXPECT_THROW(make_policy(spec), UsageError) << spec;
  }
}

TEST(Spec, QuotedValuesSurvive) {
  for (const std::string value : {"a,b", "a)b", "(", "say \"x\"", "back\\slash", " spaced ", "plain", "f(x=1,y=2)"}) {
    const auto parts = parse_spec("name(key=" + quote_value(value) + ")");
    ASSERT_EQ(parts.size(), 1u);
    EXPECT_EQ(parts[0].arguments.at(0).second, value);
  }
}

TEST(Spec, NoiseNeverDoesAnythingButThrowUsageError) {
  const std::string alphabet = "restkvsnap(),=+\" \\0123.@-%";
  std::mt19937 generator(1);
  for (int i = 0; i < 20000; ++i) {
    std::string text = i % 2 == 0 ? "" : "restkv(alpha=0.5)";
    for (std::size_t length = generator() % 12; length > 0; --length) {
      text.insert(text.begin() + static_cast<std::ptrdiff_t>(generator() % (text.size() + 1)),
                  alphabet[generator() % alphabet.size()]);
    }
    try {
      const std::string canonical = make_policy(text).canonical;
      EXPECT_EQ(make_policy(canonical).canonical, canonical) << text;
    } catch (const UsageError&) {
    }
  }
}

}  // namespace
}  // namespace kvreplay
