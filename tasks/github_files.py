"""Files of the data sets on GitHub, at one commit each, with the names git gives their contents.

A file's git name is a checksum of its content (`tasks.fetch.git_blob`), so that a file is known without having been
downloaded. Each line: the git name, the path in the repository, and the path in the data set's folder where it
differs in more than its folder.
"""

from collections.abc import Mapping

# Data set -> repository, commit, lines.
GITHUB: Mapping[str, tuple[str, str, str]] = {
    "finqa": (
        "czyssrs/FinQA",
        "0f16e2867befa6840783e58be38c9efb9229d742",
        """
        fb3b513238ba5ec7e0799cb1190ff30c759a5bdf LICENSE
        970f239f591c782b17df420c0d343b780737f3da dataset/dev.json
        59958c7c3bb3b21f4dff6bc912a0fe0ae710aee0 dataset/test.json
        a6c2c5a60f9abe3fba5a793cc4d9e1dee2e09209 dataset/train.json
        """,
    ),
    "dialogsum": (
        "cylnlp/dialogsum",
        "848cc8c05e0a04def79326539de827f1b28786a0",
        """
        de762eea17e5e2464e221ac9a1cf5c7c64eec655 DialogSum_Data/dialogsum.dev.jsonl
        1975a852f57a07f93fbabe68841c3328e3057f65 DialogSum_Data/dialogsum.test.jsonl
        0a02b0f0cbe801a75384ba28364a7528b9340587 DialogSum_Data/dialogsum.train.jsonl
        """,
    ),
    "gsm8k": (
        "openai/grade-school-math",
        "3101c7d5072418e28b9008a6636bde82a006892c",
        """
        9e84fcbc4d81a1f433c90caf9f1cef373c12edae LICENSE
        e4c2ff4942b9a78bd74f04141224c11e28d12dc9 grade_school_math/data/test.jsonl
        7d97154b91aef28d01c3301741c81ce90039a4b1 grade_school_math/data/train.jsonl
        """,
    ),
    "snips": (
        "sonos/nlu-benchmark",
        "b86ac7f1577868c42158d0dec77db50956046696",
        """
        ef7187d56c0f043ff5fe729613e2f376c9af3abd 2017-06-custom-intent-engines/AddToPlaylist/train_AddToPlaylist_full.json
        2b92bb09182bbb253ff8282afa69ac62d1167b90 2017-06-custom-intent-engines/AddToPlaylist/validate_AddToPlaylist.json
        c911b9ce8acf0ea9ecae067476d2644e2f389887 2017-06-custom-intent-engines/BookRestaurant/train_BookRestaurant_full.json
        74c37e372facdff494e0dcb900cef2c9721dde2c 2017-06-custom-intent-engines/BookRestaurant/validate_BookRestaurant.json
        2ffc13b91c5676a34db11978cc0d1ff5d5813aac 2017-06-custom-intent-engines/GetWeather/train_GetWeather_full.json
        0dceb1a008d7e52c0b51cd4e5d5b23136624b5ca 2017-06-custom-intent-engines/GetWeather/validate_GetWeather.json
        5edfe98915eec8b920c120e6396e93c81ff39556 2017-06-custom-intent-engines/PlayMusic/train_PlayMusic_full.json
        d041130c5a4080a45449a357430f01241c3fb593 2017-06-custom-intent-engines/PlayMusic/validate_PlayMusic.json
        8d8357fa18c1691398f7946e4c029fb6423e6dd4 2017-06-custom-intent-engines/RateBook/train_RateBook_full.json
        1bf3c57098d1388387982cab156dfcd281745129 2017-06-custom-intent-engines/RateBook/validate_RateBook.json
        48564af826e0471c8baf921db3046f2f53c9c927 2017-06-custom-intent-engines/SearchCreativeWork/train_SearchCreativeWork_full.json
        d9fb087d5be5590db61ae733fa261b541f01f3e6 2017-06-custom-intent-engines/SearchCreativeWork/validate_SearchCreativeWork.json
        4cdf0679de1ff75d6cc5d9a88a964a0972413d1a 2017-06-custom-intent-engines/SearchScreeningEvent/train_SearchScreeningEvent_full.json
        76d0d098b2c33282993bbd8b299d04e88df4cc92 2017-06-custom-intent-engines/SearchScreeningEvent/validate_SearchScreeningEvent.json
        670154e3538863b2d9891fd5483160fbdfc89164 LICENSE
        """,  # noqa: E501 - paths are as long as they are
    ),
    "banking77": (
        "PolyAI-LDN/task-specific-datasets",
        "57ec275d8078af65b7731c2a98be812d844a6d6b",
        """
        2f244ac814036ecd9ba9f69782e89ce6b1dca9eb LICENSE
        799687a8367359432985b8b13d85a2baf73f92dd banking_data/test.csv
        98e2543cf482d0dca7bfb175ebe35d98efad95be banking_data/train.csv
        """,
    ),
    "mtop": (
        "psunlpgroup/XSemPLR",
        "af03531af8cb6a39504e1044ba1edebef6c76d15",
        """
        c42ccb1618beb0962a35c0c7c1a19a6f765840a0 dataset/mtop/dev.json
        5f5ec18e7dda5c1153d220c5acd1f6593d8f7a45 dataset/mtop/test.json
        d391338bb35a3d61aa3283c080bff949db4caccb dataset/mtop/train.json
        """,
    ),
    "afriqa": (
        "masakhane-io/afriqa",
        "5c29933753692c28773c34ac1f68482007f1d2bb",
        """
        2f244ac814036ecd9ba9f69782e89ce6b1dca9eb LICENSE
        cbe81b7864f6a45ae03ce38f668de6c5b610defa data/gold_passages/bem/gold_span_passages.afriqa.bem.en.dev.json
        95c29dbae3cebc1dcf1d4aa12e4e618573ceed39 data/gold_passages/bem/gold_span_passages.afriqa.bem.en.test.json
        6ef605bd0690968924f1e4cc16de8389ee2cc71a data/gold_passages/bem/gold_span_passages.afriqa.bem.en.train.json
        16f3bd2b7e639aa94d42e34e32a5bcb718de781c data/gold_passages/fon/gold_span_passages.afriqa.fon.fr.dev.json
        05ade57f704827fd49b9018c35a4d50d553de3c4 data/gold_passages/fon/gold_span_passages.afriqa.fon.fr.test.json
        9cc4f57cbaacc0d508d9b200673c634e3c5c80d1 data/gold_passages/fon/gold_span_passages.afriqa.fon.fr.train.json
        ecb678b7a1da526fd7b32514d77cd819aec3065c data/gold_passages/hau/gold_span_passages.afriqa.hau.en.dev.json
        67565f8093bd9c5da708c8bf40d0a4403e497fee data/gold_passages/hau/gold_span_passages.afriqa.hau.en.test.json
        923d309e2818b9a199374e2c4c85f62c982a80f9 data/gold_passages/hau/gold_span_passages.afriqa.hau.en.train.json
        0f102930cf23a541395935c79db762742b3e9466 data/gold_passages/ibo/gold_span_passages.afriqa.ibo.en.dev.json
        1fdbdc1206f3aef05dcf48efe7c55cf86394b345 data/gold_passages/ibo/gold_span_passages.afriqa.ibo.en.test.json
        69849ab293de0e0533251da0bd741767792194f9 data/gold_passages/ibo/gold_span_passages.afriqa.ibo.en.train.json
        506f8dbba3477e7ed0042bbe00f2af42cc8df764 data/gold_passages/kin/gold_span_passages.afriqa.kin.en.dev.json
        880ad4a10f1171fdbf5fefada21a142e5fd9c4c6 data/gold_passages/kin/gold_span_passages.afriqa.kin.en.test.json
        3fb0f21beb4f0fbd7e9b0eb1e5f4ae7902eb5aa3 data/gold_passages/kin/gold_span_passages.afriqa.kin.en.train.json
        a0c36085843130fa2b6268d97e55f280fa840459 data/gold_passages/swa/gold_span_passages.afriqa.swa.en.test.json
        0dbd4725eb286dd9a6b48e27197eb7aead05277f data/gold_passages/twi/gold_span_passages.afriqa.twi.en.dev.json
        e20535315f50e0d9da8b800737f9a113216c7432 data/gold_passages/twi/gold_span_passages.afriqa.twi.en.test.json
        79c55e91dda1cc604461393029237231cae81bd7 data/gold_passages/twi/gold_span_passages.afriqa.twi.en.train.json
        4b473df973dad8a8164483d4cf46d7a35579e4e4 data/gold_passages/yor/gold_span_passages.afriqa.yor.en.test.json
        fd27032a6d0bec7acd3daacdaf343908642bf516 data/gold_passages/yor/gold_span_passages.afriqa.yor.en.train.json
        b6f407219686b8004059c35a898f35ab79d4467f data/gold_passages/zul/gold_span_passages.afriqa.zul.en.dev.json
        726667e5d54169332ce3d2bf804b052427abdbec data/gold_passages/zul/gold_span_passages.afriqa.zul.en.test.json
        f5e1cdc4e1194583adc0ef20489a29f39a8e83ed data/gold_passages/zul/gold_span_passages.afriqa.zul.en.train.json
        """,
    ),
    "masakhaner_x": (
        "masakhane-io/masakhane-ner",
        "ba5843cd08aa491d5f96a5e809e71eb9ec461391",
        """
        6bf5670d6715b549aeca6dd5155d21edf0cfea33 xtreme-up/MasakhaNER-X/test/am.jsonl test/am.jsonl
        351e0464d99f0d892ffefc5352b3514178deaf04 xtreme-up/MasakhaNER-X/test/bbj.jsonl test/bbj.jsonl
        14390ab7bc018e3a2ff1e6fa6822c2ae3cb08c54 xtreme-up/MasakhaNER-X/test/bm.jsonl test/bm.jsonl
        f7fffdc22136e4283ed66c9e411d0aaa20be0312 xtreme-up/MasakhaNER-X/test/ee.jsonl test/ee.jsonl
        84df8ce57feda60987341b98d4d452cc197bce63 xtreme-up/MasakhaNER-X/test/ha.jsonl test/ha.jsonl
        62a3e5a3f0386a5e73c64a8edf6b8c022735fb3f xtreme-up/MasakhaNER-X/test/ig.jsonl test/ig.jsonl
        bab7c23575f5b9f6cd4c60376538bf089d57630f xtreme-up/MasakhaNER-X/test/lg.jsonl test/lg.jsonl
        d2db7fb185dd7ba0c50a20bb4736413b7de1569f xtreme-up/MasakhaNER-X/test/luo.jsonl test/luo.jsonl
        1ab25ff80a7b9e49292e37fce08576195c868a22 xtreme-up/MasakhaNER-X/test/mos.jsonl test/mos.jsonl
        b0ac84364f4ed4932c6ec05ac18835e654f180d4 xtreme-up/MasakhaNER-X/test/ny.jsonl test/ny.jsonl
        7c38980b31e2c2185a31dc29b8ded3267c2c6d89 xtreme-up/MasakhaNER-X/test/pcm.jsonl test/pcm.jsonl
        1fd6fa027d5812d427112283b8c73a18ca537816 xtreme-up/MasakhaNER-X/test/rw.jsonl test/rw.jsonl
        0ea5a14f4388db11368b48d57387421e4f5a021a xtreme-up/MasakhaNER-X/test/sn.jsonl test/sn.jsonl
        04eb59b81cf78c4d5d5f888d9a259cf26cfbbf84 xtreme-up/MasakhaNER-X/test/sw.jsonl test/sw.jsonl
        6391f1367194448d4fb4a859cbace725e7b86303 xtreme-up/MasakhaNER-X/test/tn.jsonl test/tn.jsonl
        f83f04932b8dd26b3261a2e72728ceec4f04e4d1 xtreme-up/MasakhaNER-X/test/tw.jsonl test/tw.jsonl
        77def90ea895196dc8d962dd93dd20107d86df76 xtreme-up/MasakhaNER-X/test/wo.jsonl test/wo.jsonl
        1f9ef45aef58b91b7c3c046856ba877d93f85201 xtreme-up/MasakhaNER-X/test/xh.jsonl test/xh.jsonl
        c14410a217bd7dfa8ed0d8101bb7e4f47ee920c2 xtreme-up/MasakhaNER-X/test/yo.jsonl test/yo.jsonl
        f2f0b326844bec0904e751cc9c5d33ebb677a42f xtreme-up/MasakhaNER-X/test/zu.jsonl test/zu.jsonl
        4a3b64fb0294253c8692c4511cf234ba92700986 xtreme-up/MasakhaNER-X/train/am.jsonl train/am.jsonl
        7050edbd75ecae2582be237368497b4233573bee xtreme-up/MasakhaNER-X/train/bbj.jsonl train/bbj.jsonl
        e7b8eb43914fe6a07e10220165b78a7de3a72e2c xtreme-up/MasakhaNER-X/train/bm.jsonl train/bm.jsonl
        ae569aef59ebad7ca4aa28fa775ed4de6dd5bcea xtreme-up/MasakhaNER-X/train/ee.jsonl train/ee.jsonl
        77c5f9bec7b5d7fc4648eae764f6befb10d3e579 xtreme-up/MasakhaNER-X/train/ha.jsonl train/ha.jsonl
        3004ca814a0f84ccad6d3258d2ede13bfcc35986 xtreme-up/MasakhaNER-X/train/ig.jsonl train/ig.jsonl
        a714322778e84a64216cca768dc48575826de498 xtreme-up/MasakhaNER-X/train/lg.jsonl train/lg.jsonl
        b53196cde3eda5a4532c65f84db7748a5dd11fd2 xtreme-up/MasakhaNER-X/train/luo.jsonl train/luo.jsonl
        1e7bf92007f8495cf2e19a24b344331361546804 xtreme-up/MasakhaNER-X/train/mos.jsonl train/mos.jsonl
        46c3ebe11fac8ab9c4b892be614500f3e641590c xtreme-up/MasakhaNER-X/train/ny.jsonl train/ny.jsonl
        1320146c22cb5ee0c5797719326d206d36f0d293 xtreme-up/MasakhaNER-X/train/pcm.jsonl train/pcm.jsonl
        0edfe4c6e12a3ce3f31fbe8b241425107f03a4cc xtreme-up/MasakhaNER-X/train/rw.jsonl train/rw.jsonl
        51fcfb954f2f330e7f6955009c157ba01b639439 xtreme-up/MasakhaNER-X/train/sn.jsonl train/sn.jsonl
        f1d3413ce20d71fe763756d933ff19256ac3b72a xtreme-up/MasakhaNER-X/train/sw.jsonl train/sw.jsonl
        8b5d2fba80edfa2135682b10456b4866f6f07544 xtreme-up/MasakhaNER-X/train/tn.jsonl train/tn.jsonl
        b3a4923ad5bdaef68d01a5dd28f4b1b7aba7325b xtreme-up/MasakhaNER-X/train/tw.jsonl train/tw.jsonl
        0a627d08047d6c4c24ec26ec4fe2b12c500b0624 xtreme-up/MasakhaNER-X/train/wo.jsonl train/wo.jsonl
        7a92a5baa575dee7214d0d6f51ca4c66945a7150 xtreme-up/MasakhaNER-X/train/xh.jsonl train/xh.jsonl
        fbf87489b4e6cc88f75a48e44ebebb798a59e763 xtreme-up/MasakhaNER-X/train/yo.jsonl train/yo.jsonl
        da7ab7b59e947f49d68571d45cab719769106685 xtreme-up/MasakhaNER-X/train/zu.jsonl train/zu.jsonl
        02663e1e537bd59a31158d3a1843c0404a216797 xtreme-up/MasakhaNER-X/validation/am.jsonl validation/am.jsonl
        da69349fc8fb53abb77a8bbc728fb233d3b404f9 xtreme-up/MasakhaNER-X/validation/bbj.jsonl validation/bbj.jsonl
        47977e2ff90dd543c4cb29e3df4bad1a0efa7777 xtreme-up/MasakhaNER-X/validation/bm.jsonl validation/bm.jsonl
        74f12956b0a9ac8e5711a41ffecbf601cf1e7515 xtreme-up/MasakhaNER-X/validation/ee.jsonl validation/ee.jsonl
        389e723f56989728bf4b539468ae0aa077f76a39 xtreme-up/MasakhaNER-X/validation/ha.jsonl validation/ha.jsonl
        76f57f137ee4a554f4d12bc533828d1cd3ca62fb xtreme-up/MasakhaNER-X/validation/ig.jsonl validation/ig.jsonl
        c8f7a492900c23f367b2c29a6d087eb5a63947a7 xtreme-up/MasakhaNER-X/validation/lg.jsonl validation/lg.jsonl
        595916db23427c34112fb56139975eac9d18a233 xtreme-up/MasakhaNER-X/validation/luo.jsonl validation/luo.jsonl
        5f0df96350b8568ea36368b6b4485a6d9054e837 xtreme-up/MasakhaNER-X/validation/mos.jsonl validation/mos.jsonl
        c62f1e9e5e70896b2dd934a5a813b23c8a720b8f xtreme-up/MasakhaNER-X/validation/ny.jsonl validation/ny.jsonl
        b36835a8e9e27c304228c7457398ad660467ed1d xtreme-up/MasakhaNER-X/validation/pcm.jsonl validation/pcm.jsonl
        49abc2e0a42481de48b89e225eec7833649ce44b xtreme-up/MasakhaNER-X/validation/rw.jsonl validation/rw.jsonl
        a8052446f96968da1f64be7f42488c1ca5b754c6 xtreme-up/MasakhaNER-X/validation/sn.jsonl validation/sn.jsonl
        2fef4a8a85a38034f652af267401c1fe9d04bded xtreme-up/MasakhaNER-X/validation/sw.jsonl validation/sw.jsonl
        dcb90bb3a0b21fb605bdddce2d1edebbb4cd78d5 xtreme-up/MasakhaNER-X/validation/tn.jsonl validation/tn.jsonl
        25f3b87f9251566a85312d9b875f987564880cd5 xtreme-up/MasakhaNER-X/validation/tw.jsonl validation/tw.jsonl
        c986357626086ea3fa009251ad5742ca3bd325a2 xtreme-up/MasakhaNER-X/validation/wo.jsonl validation/wo.jsonl
        7b612416a559245de7bc1106a30c7608769d5415 xtreme-up/MasakhaNER-X/validation/xh.jsonl validation/xh.jsonl
        2d652efdecb2b52beb061bfb71d77ce9daaa4d91 xtreme-up/MasakhaNER-X/validation/yo.jsonl validation/yo.jsonl
        3f4cfe779a4962434ca01a2ca4b11f36cd048c8a xtreme-up/MasakhaNER-X/validation/zu.jsonl validation/zu.jsonl
        """,
    ),
    "bengali_ner": (
        "Rifat1493/Bengali-NER",
        "01656468c4e6e31dd6aff4cb42be1dc751a1abcf",
        """
        c1ca2242847aaadb0ddb0ca41fdf6bcad42774c1 Input/test_data.txt
        bf9f275d7d7571d85eba48bbd44716f1677e9ba3 Input/train_data.txt
        722d5185578a1d66e302210fff48c47018d99d9a LICENSE
        """,
    ),
}
